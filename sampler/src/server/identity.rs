//! Ids from the system's random numbers.

/// `prefix-` and 128 random bits, which nobody guesses.
pub fn new_id(prefix: &str) -> String {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    bytes.iter().fold(format!("{prefix}-"), |id, byte| format!("{id}{byte:02x}"))
}
