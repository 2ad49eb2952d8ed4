//! `ng-sample serve` as a process: what it will not start with, its signals, its images.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tests::fixture::Fixture;
use tests::program::{Ended, Program, typed};

const PROMPT: &str = "a green OWL";

fn export(home: &Path) -> String {
    let (fixture, export) = (Fixture::open("tiny-schnell"), typed(&home.join("tiny")));
    Program::Export.run([typed(&fixture.pipeline).as_str(), "--out", &export]).succeeded();
    export
}

fn serve(export: &str, more: &[&str]) -> Command {
    let mut command = Program::Sample.command(["serve", "--model", export]);
    command.args(more).env_remove("NG_SAMPLE_TOKEN");
    command
}

/// A started server and its address; it ends with its test.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(export: &str) -> Self {
        let mut command = serve(export, &["--listen", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").expect("an address").to_owned();
        Self { child, address }
    }

    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}",
            self.address
        )
        .unwrap();
        stream
    }

    /// Requests running and waiting.
    fn under_way(&self) -> usize {
        let text = String::from_utf8(self.ask("GET", "/metrics", "")).unwrap();
        let of = |name: &str| -> usize {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().parse().unwrap()
        };
        of("ng_sample_num_requests_running ") + of("ng_sample_num_requests_waiting ")
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Vec<u8> {
        answer(self.send(method, path, body))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of a 200 or 202.
fn answer(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|part| part == b"\r\n\r\n").expect("a whole head");
    let head = String::from_utf8_lossy(&bytes[..end]);
    assert!(head.starts_with("HTTP/1.1 20"), "{}", String::from_utf8_lossy(&bytes));
    bytes.split_off(end + 4)
}

#[test]
fn the_server_draws_what_the_program_draws_and_ends_when_all_is_answered() {
    let home = tempfile::tempdir().unwrap();
    let export = export(home.path());
    let png = home.path().join("alone.png");
    let size = ["--width", "32", "--height", "48", "--steps", "3", "--seed", "7"];
    let mut alone = Program::Sample.command(["--model", &export, "--prompt", PROMPT]);
    Ended::after(alone.args(size).arg("--out").arg(&png)).succeeded();

    let mut server = Server::start(&export);
    let wish = format!(
        r#"{{"prompt": "{PROMPT}", "width": 32, "height": 48, "steps": 3, "seed": 7, "count": 2}}"#
    );
    let job: serde_json::Value =
        serde_json::from_slice(&server.ask("POST", "/api/jobs", &wish)).unwrap();
    let path = format!("/api/jobs/{}", job["id"].as_str().unwrap());
    server.ask("GET", &format!("{path}/events"), "");
    let image = server.ask("GET", &format!("{path}/images/0"), "");
    assert!(image == fs::read(&png).unwrap(), "the server's file is the program's");
    server.ask("GET", &format!("{path}/images/1"), "");

    let wish = format!(r#"{{"prompt": "{PROMPT}", "size": "64x64", "num_inference_steps": 60}}"#);
    let accepted: Vec<TcpStream> =
        (0..6).map(|_| server.send("POST", "/v1/images/generations", &wish)).collect();
    let accepted_all = (0..1000).any(|_| server.under_way() == accepted.len());
    assert!(accepted_all, "six long requests are not under way together");
    let id = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    for stream in accepted {
        assert!(answer(stream).windows(8).any(|part| part == b"b64_json"));
    }
    assert!(server.child.wait().unwrap().success());
    let mut log = String::new();
    server.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(!log.contains("OWL"), "prompts stay out of the log");
    let events: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect();
    let count = |event: &str| events.iter().filter(|line| line["event"] == event).count();
    assert_eq!((count("listening"), count("job"), count("stopped")), (1, 7, 1));
}

#[test]
fn an_open_address_needs_a_token() {
    let home = tempfile::tempdir().unwrap();
    let export = home.path().join("nothing-is-read");
    let short = home.path().join("token");
    fs::write(&short, "short\n").unwrap();
    let short = typed(&short);
    for (more, code, part) in [
        (vec!["--listen", "0.0.0.0:0"], 2, "give a token with --token-file or NG_SAMPLE_TOKEN"),
        (vec!["--listen", "[::]:0"], 2, "can be reached from other machines"),
        (vec!["--allow-host", "images.example.org"], 2, "lets requests from elsewhere in"),
        (vec!["--token-file", &short], 1, "a token has at least 16 printable characters"),
        (vec!["--listen", "127.0.0.1"], 2, "invalid socket address"),
        (vec!["--model", "a=b", "--queue", "0"], 2, "--queue"),
    ] {
        let ended = Ended::after(&mut serve(&typed(&export), &more));
        assert_eq!(ended.status.code(), Some(code), "{more:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(part), "{more:?}: {}", ended.stderr);
    }
}
