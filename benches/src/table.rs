//! Tables for a terminal that are Markdown too.

/// Prints `rows` under `header`; the first column is aligned left, the others right.
///
/// # Panics
/// When a row has not as many cells as the header.
pub fn print<const N: usize>(header: [&str; N], rows: &[[String; N]]) {
    print!("{}", markdown(header, rows));
}

fn markdown<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let header = header.map(str::to_owned);
    let width = |column: usize| {
        let cells = rows.iter().chain([&header]).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(2)
    };
    let line = |row: &[String; N]| {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = width(column);
            if column == 0 { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") }
        });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = (0..N).map(|column| {
        let dashes = "-".repeat(width(column) + 1);
        if column == 0 { format!("{dashes}-|") } else { format!("{dashes}:|") }
    });
    let rule = format!("|{}\n", rule.collect::<String>());
    line(&header) + &rule + &rows.iter().map(line).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::markdown;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".to_owned(), "1.00".to_owned()], ["η = 1".to_owned(), "10.00".to_owned()]];
        assert_eq!(
            markdown(["", "ms"], &rows),
            "|       |    ms |\n|-------|------:|\n| a     |  1.00 |\n| η = 1 | 10.00 |\n"
        );
    }
}
