use std::sync::atomic::{AtomicBool, Ordering};

use super::super::{
    RewardConfig, RewardKind, Rewards, Scores,
    loopback::{Loopback, Reply, Seen, images, refusing, width},
    pairwise::Pairwise,
};
use super::*;
use tch::Device;

const OWN: &str = "prompt = 'How much {prompt}?'\npattern = 'Score: (\\S+)'";

fn reward(url: &str, more: &str) -> Result<Box<dyn Reward>> {
    let table =
        format!("kind = 'chat'\nname = 'judge'\nweight = 1\nurl = '{url}'\nmodel = 'm'\n{more}");
    super::super::open(&toml::from_str::<RewardConfig>(&table)?.kind, 1, Device::Cpu)
}

fn says(text: &str) -> Reply {
    let choice = json!({ "message": { "role": "assistant", "content": text } });
    Reply::Say(200, json!({ "choices": [choice], "error": null }).to_string())
}

fn shown(body: &Value) -> Vec<u32> {
    let content = body["messages"][0]["content"].as_array().unwrap();
    content
        .iter()
        .filter_map(|part| part.get("image_url"))
        .map(|part| width(&part["url"]))
        .collect()
}

#[test]
fn the_judge_sees_the_image_and_the_question() {
    let server = Loopback::start(|_, body| says(&format!("Hm. Score: {}.5", shown(body)[0])));
    let more = format!("{OWN}\nmax_tokens = 7\napi_key_env = 'CARGO_PKG_NAME'");
    let reward = reward(&server.url(), &more).unwrap();
    let prompts = [Prompt::new("a {prompt}"), Prompt::new("b \"c\"")];
    let pictures = images(2);
    let scores = reward.score(&prompts.each_ref(), &pictures.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(scores, [1.5, 2.5]);
    let mut seen = server.seen();
    seen.sort_by_key(|Seen { body, .. }| shown(body));
    for (Seen { head, body }, question) in
        seen.iter().zip(["How much a {prompt}?", "How much b \"c\"?"])
    {
        assert_eq!(body["messages"][0]["content"][1], json!({"type": "text", "text": question}));
        assert_eq!((&body["model"], &body["temperature"]), (&json!("m"), &json!(0)));
        assert_eq!(body["max_tokens"], json!(7));
        assert!(head.contains("\r\nauthorization: bearer trainer\r\n"), "{head}");
    }
}

#[test]
fn an_answer_without_a_score_is_a_failure() {
    for (reply, expected) in [
        ("I like\nit", "does not match \"Score: (\\\\S+)\": I like it"),
        ("Score: high", "\"high\" is no number"),
        ("Score: NaN", "\"NaN\" is not finite"),
        ("Score: 1e999", "\"1e999\" is not finite"),
    ] {
        let server = Loopback::start(move |_, _| says(reply));
        let reward = reward(&server.url(), OWN).unwrap();
        let error = reward.score(&[&Prompt::new("a")], &[&images(1)[0]]).unwrap_err();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
    let server = Loopback::start(|_, _| Reply::Say(200, "{\"choices\": []}".into()));
    let error = reward(&server.url(), OWN).unwrap().score(&[&Prompt::new("a")], &[&images(1)[0]]);
    assert!(format!("{:#}", error.unwrap_err()).contains("choices[0].message.content"));
}

type Fault = fn() -> Reply;

/// Answers about an image that are no score, and what is said of each.
const FAULTS: [(Fault, &str); 6] = [
    (|| Reply::Stall, "no answer in 0.3 s"),
    (|| Reply::CutShort, "Peer disconnected"),
    (|| Reply::Say(500, "it\nbroke".to_owned()), "status 500 Internal Server Error: it broke"),
    (|| Reply::Say(200, "<html>".to_owned()), "not JSON"),
    (|| Reply::Say(200, "{\"choices\": []}".to_owned()), "no choices[0].message.content"),
    (|| says("Score: NaN"), "not finite"),
];

/// Scores three images with one further attempt.
fn score_three(url: &str, required: bool) -> Result<Scores> {
    let table = format!(
        "kind = 'chat'\nname = 'judge'\nweight = 1\nurl = '{url}'\nmodel = 'm'\ntimeout = 0.3\n\
         retries = 1\npatience = 0\nrequired = {required}\n{OWN}"
    );
    let rewards = Rewards::open(&[toml::from_str(&table)?], 1, Device::Cpu)?;
    rewards.score(&[&Prompt::new("a"); 3], &images(3).iter().collect::<Vec<_>>())
}

/// The judge scores images by their width, but for one fault at the second.
#[test]
fn a_fault_at_one_image_is_asked_about_again_alone() {
    for (fault, expected) in FAULTS {
        let failed = AtomicBool::new(false);
        let server = Loopback::start(move |_, body| {
            let width = shown(body)[0];
            let is_bad = width == 2 && !failed.swap(true, Ordering::SeqCst);
            if is_bad { fault() } else { says(&format!("Score: {width}")) }
        });
        let outcome = &score_three(&server.url(), true).unwrap().outcomes[0];
        assert_eq!(outcome.scores.as_deref(), Some(&[1.0, 2.0, 3.0][..]), "{expected}");
        assert_eq!((outcome.failures, outcome.retries), (1, 1), "{expected}");
        assert!(outcome.error.as_deref().unwrap().contains(expected), "{outcome:?}");
        let n_asked = |width| server.seen().iter().filter(|s| shown(&s.body) == [width]).count();
        assert_eq!([1, 2, 3].map(n_asked), [1, 2, 1], "{expected}");
    }
}

#[test]
fn a_lasting_fault_leaves_the_judge_out_or_ends_the_run() {
    for (fault, expected) in FAULTS {
        let server = Loopback::start(move |_, _| fault());
        let outcome = &score_three(&server.url(), false).unwrap().outcomes[0];
        assert_eq!((&outcome.scores, outcome.failures), (&None, 2), "{expected}");
        let error = format!("{:#}", score_three(&server.url(), true).unwrap_err());
        for part in ["reward \"judge\" failed, attempts: 2: http://127.0.0.1:", expected] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
    let error = format!("{:#}", score_three(&refusing(), true).unwrap_err());
    assert!(error.contains("attempts: 2") && error.contains("Connection refused"), "{error}");
}

/// Answers in the form that each question asks for.
#[test]
fn judges_that_ship_find_their_verdicts() {
    for (name, answer, expected) in [
        ("unified-reward", "Final Score: 3.46", Some("3.46")),
        ("unified-reward", "sky (location): 1\nFinal Score:4\n", Some("4")),
        ("unified-reward", "Score: 4", None),
        (
            "unified-reward-alignment",
            "Word-wise Scores: [[\"a\", 0.1]]\n\nAlignment Score (1-5): 2.69\nCoherence Score (1-5): 4",
            Some("2.69"),
        ),
        ("better-image", "<think>Image 2 …</think>\n<answer>Image 1 is better</answer>", Some("1")),
        ("better-image", "It is close.\n<answer> tie</answer>", Some("tie")),
        ("better-image", "Image 2 is better", None),
    ] {
        let judge = shipped(name).unwrap();
        assert!(judge.prompt.contains("{prompt}"), "{name}");
        let groups = Regex::new(&judge.pattern).unwrap().captures(answer);
        assert_eq!(groups.as_ref().map(|groups| &groups[1]), expected, "{name}: {answer}");
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    for (more, says) in [
        ("", "give `prompt`, or one of `judge`: unified-reward, "),
        ("prompt = 'a'", "give `pattern`"),
        ("judge = 'unified'", "unknown `judge` \"unified\""),
        ("prompt = 'a'\npattern = 'a(b'", "unclosed group"),
        ("prompt = 'a'\npattern = '(a)(b)'", "has 2 groups"),
        ("judge = 'unified-reward'\nmax_tokens = 0", "`max_tokens`"),
        ("judge = 'unified-reward'\ntemprature = 1", "temprature"),
    ] {
        let error = format!("{:#}", reward("http://a/b", more).err().unwrap());
        assert!(error.contains(says), "{more}: {error}");
    }
}

fn pairwise(judge: &str) -> Result<Box<dyn Reward>> {
    let table = format!("kind = 'pairwise'\nname = 'p'\nweight = 1\njudge = {{ {judge} }}");
    super::super::open(&toml::from_str::<RewardConfig>(&table)?.kind, 2, Device::Cpu)
}

fn chat_at(url: &str) -> String {
    format!("kind = 'chat', url = '{url}', model = 'm', judge = 'better-image'")
}

/// The wider image wins, those of width 2 and 3 tie: whoever is shown first.
#[test]
fn win_rates_of_a_judge_who_sees_pairs() {
    let server = Loopback::start(|_, body| {
        let verdict = match shown(body)[..] {
            [2, 3] | [3, 2] => "tie",
            [a, b] if a > b => "Image 1 is better",
            _ => "Image 2 is better",
        };
        says(&format!("<answer>{verdict}</answer>"))
    });
    let reward = pairwise(&chat_at(&server.url())).unwrap();
    let (pictures, prompts) = (images(4), [Prompt::new("a"), Prompt::new("b")]);
    let order = [2, 0, 3, 1];
    let pictures: Vec<&RgbImage> = order.iter().map(|&i| &pictures[i]).collect();
    let rates = reward.score(&[&prompts[0]; 4], &pictures).unwrap();
    let expected = [0.0, 1.5 / 3.0, 1.5 / 3.0, 1.0];
    assert_eq!(rates, order.map(|i| expected[i]));
    assert_eq!(server.seen().len(), 6);

    let two_groups = [&prompts[0], &prompts[0], &prompts[1], &prompts[1]];
    assert_eq!(reward.score(&two_groups, &pictures).unwrap(), [1.0, 0.0, 1.0, 0.0]);
    let error = reward.score(&[&prompts[0]], &pictures[..1]).unwrap_err();
    assert!(
        error.is::<super::super::Lasting>() && error.to_string().contains("nothing to compare")
    );
}

#[test]
fn win_rates_by_the_scores_of_another_reward() {
    let jpeg = pairwise("kind = 'jpeg', prefer = 'large'").unwrap();
    let mut pictures = vec![RgbImage::new(32, 32); 3];
    pictures[1] = RgbImage::from_fn(32, 32, |x, y| image::Rgb([(x * y * 37 % 251) as u8; 3]));
    let pictures: Vec<&RgbImage> = pictures.iter().collect();
    let rates = jpeg.score(&[&Prompt::new("a"); 3], &pictures).unwrap();
    assert_eq!(rates, [0.25, 1.0, 0.25]);
    let nested = RewardKind::Pairwise { judge: Box::new(RewardKind::Colour {}) };
    assert!(Pairwise::open(&nested, 1, Device::Cpu).is_err());
    assert!(pairwise("kind = 'colour'").unwrap().check(&[&Prompt::new("no ink")], None).is_err());
}

/// A verdict that cannot be read is asked for again; the other pairs are not.
#[test]
fn a_failed_pair_is_no_tie() {
    let server = Loopback::start(|n, _| {
        says(if n == 3 { "I cannot say" } else { "<answer>Image 1 is better</answer>" })
    });
    let table = format!(
        "kind = 'pairwise'\nname = 'p'\nweight = 1\njudge = {{ {} }}",
        chat_at(&server.url())
    );
    let config: RewardConfig = toml::from_str(&table).unwrap();
    let rewards = Rewards::open(&[config], 1, Device::Cpu).unwrap();
    let pictures = images(4);
    let prompt = Prompt::new("a");
    let scores = rewards.score(&[&prompt; 4], &pictures.iter().collect::<Vec<_>>()).unwrap();
    let outcome = &scores.outcomes[0];
    assert_eq!((outcome.failures, server.seen().len()), (1, 7));
    assert!(outcome.error.as_deref().unwrap().contains("I cannot say"));
    let sum: f64 = outcome.scores.as_ref().unwrap().iter().sum();
    assert!((sum - 2.0).abs() < 1e-12, "six wins over three others each");
}
