use std::fs;

use super::*;

fn read_as(name: &str, content: impl AsRef<[u8]>) -> Result<Prompts, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    read(&path)
}

fn texts(prompts: &Prompts) -> Vec<&str> {
    prompts.prompts.iter().map(|prompt| prompt.text.as_str()).collect()
}

#[test]
fn every_layout_is_read() {
    let text = read_as("p.txt", "\u{feff}a cat\r\n\n  red \"HAT\"  \n").unwrap();
    assert_eq!(text.prompts, [Prompt::new("a cat"), Prompt::new("red \"HAT\"")]);
    assert_eq!(text.notices(), [""; 0]);
    let list = read_as("p.json", "[\"a cat\", {\"text\": \"a dog\", \"id\": 3}]").unwrap().prompts;
    assert_eq!(list[0], Prompt::new("a cat"));
    assert_eq!((&*list[1].text, list[1].fields["id"].as_i64()), ("a dog", Some(3)));
    let lines = "{\"prompt\":\"x\",\"target\":\"HI\",\"color\":\"red\",\"tag\":{}}\n\n\"y\"\n{\"caption\":\"z\",\"target\":null}";
    let lines = read_as("p.jsonl", lines).unwrap().prompts;
    assert_eq!(lines[0].target.as_deref(), Some("HI"));
    assert_eq!(lines[0].colour.as_deref(), Some("red"));
    assert_eq!(lines[1], Prompt::new("y"));
    assert_eq!((&*lines[2].text, &lines[2].target), ("z", &None));
}

/// Rows of HPDv2, of flow_grpo's geneval, of UniGenBench, of verl with and without parts.
#[test]
fn rows_of_other_projects_are_prompts() {
    let rows = r#"[
        {"human_preference": [0, 1], "prompt": "a fox", "file_path": ["a.jpg", "b.jpg"]},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"},
        {"index": 4, "prompt_en": "a hen", "sub_dims": {"a": ["b"]}},
        {"prompt": [{"role": "system", "content": "Describe."}, {"role": "user", "content": "a sign"}],
         "reward_model": {"style": "rule", "ground_truth": "HI"}, "extra_info": {"raw_prompt": "a sign"}},
        {"prompt": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "?"},
                    {"role": "user", "content": [{"type": "text", "text": "a cow"}, {"type": "image"}]}],
         "reward_model": {"style": "model", "ground_truth": "none"}}
    ]"#;
    let read = read_as("p.json", rows).unwrap();
    assert_eq!(texts(&read), ["a fox", "two cups", "a hen", "a sign", "a cow"]);
    let targets: Vec<Option<&str>> = read.prompts.iter().map(|p| p.target.as_deref()).collect();
    assert_eq!(targets, [None, None, None, Some("HI"), None]);
}

/// UniGenBench has commas and quotes in its prompts, PartiPrompts tabs between them.
#[test]
fn tables_of_text_are_read() {
    let rows = "\u{feff}index,Prompt_EN,sub_dims\r\n1,\"a \"\"red\"\" fox, asleep\",\"{'a': 1}\"\r\n2,,x\r\n\
                3,\"a hen\non a roof\",\n4,a cow, a calf,x\n5,\"a pig\",\n";
    let read = read_as("p.csv", rows).unwrap();
    assert_eq!(texts(&read), ["a \"red\" fox, asleep", "a hen on a roof", "a pig"]);
    assert_eq!(read.prompts[0].fields["sub_dims"], "{'a': 1}");
    let told = read.notices().concat();
    assert!(told.contains("2 rows left out (first row 2: the prompt is empty"), "{told}");
    let read = read_as("p.TSV", "Prompt\tCategory\na cat, a dog\tAnimals\n").unwrap();
    assert_eq!(texts(&read), ["a cat, a dog"]);
    let one = read_as("p.csv", "prompt\na cow, a calf\na hen\n").unwrap();
    assert!(one.notices().concat().contains("row 1: 2 fields under 1 names"), "{one:?}");
}

#[test]
fn a_bad_row_costs_itself_alone_and_is_told() {
    let long = format!("ok\n{}\nb", "x".repeat(9000));
    let of_json = format!("{{\"prompt\":\"ok\",\"raw\":\"{}\"}}", "x".repeat(20_000));
    for (name, content, kept, says) in [
        (
            "p.txt",
            long.as_bytes(),
            &["ok", "b"][..],
            "1 row left out (line 2: the prompt is longer",
        ),
        ("p.txt", b"ok\n\xff\xfe\nb\n", &["ok", "b"], "(line 2: not UTF-8)"),
        (
            "p.json",
            br#"["a", "", "  ", 3, null, "b"]"#,
            &["a", "b"],
            "4 rows left out (first entry 2: the prompt is empty)",
        ),
        (
            "p.jsonl",
            b"\"ok\"\n{\"prompt\":\n{\"image\":1}",
            &["ok"],
            "2 rows left out (first line 2: not JSON",
        ),
        ("p.jsonl", b"\"ok\"\n{\"prompt\":\"a\",\"target\":7}", &["ok"], "`target` is not"),
        ("p.jsonl", b"\"ok\"\n{\"prompt\":[{\"role\":\"system\"}]}", &["ok"], "conversation"),
        (
            "p.json",
            "[\"a\\r\\nb\", \"c\u{85}d\", \"e\\u0000f\", \"g\u{2028} h\"]".as_bytes(),
            &["a b", "c d", "ef", "g h"],
            "4 rows with line breaks or control characters inside",
        ),
        ("p.txt", b"a\x07b\n", &["ab"], "(line 1)"),
        ("p.jsonl", of_json.as_bytes(), &["ok"], ""),
    ] {
        let read = read_as(name, content).unwrap();
        assert_eq!(texts(&read), kept, "{says}");
        assert!(read.notices().concat().contains(says), "{says}: {:?}", read.notices());
    }
}

#[test]
fn a_file_without_prompts_is_one_line_with_name_and_reason() {
    let cases: [(&str, &[u8], &str); 10] = [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.jsonl", b"{\"prompt\":\"  \"}", "holds no prompt: line 1: the prompt is empty"),
        ("p.json", b"[3]", "entry 1: expected a string"),
        ("p.json", b"{\"prompt\":\"a\"}", "expected a list"),
        ("p.json", b"[\"a\",\n", "line 2"),
        ("p.json", b"[\"\xff\"]", "not JSON"),
        ("p.txt", b"\xff\xfea\0", "UTF-16"),
        ("p.doc", b"a", "ends in .txt, .json, .jsonl, .csv, .tsv"),
        ("p.csv", b"index,wording\n1,a fox\n", "among index, wording; or give a .jsonl"),
    ];
    for (name, content, expected) in cases {
        let error = read_as(name, content).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(name), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let error = read(Path::new("no/such.txt")).unwrap_err().to_string();
    assert!(error.contains("no/such.txt"), "{error}");
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), end in 0..ENDS.len()) {
        if let Ok(prompts) = read_as(&format!("p.{}", ENDS[end]), bytes) {
            proptest::prop_assert!(prompts.prompts.iter().all(|p| super::super::check(&p.text).is_ok()));
        }
    }
}
