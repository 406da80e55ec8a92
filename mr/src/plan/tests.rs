use super::*;
use hw_model::fault_plan::{Action, Direction};
use std::time::Duration;

fn read(text: &str) -> Plan {
    Plan::read(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

#[test]
fn the_seventh_page_fault_fails() {
    let plan = read("[[rule]]\npoint = \"mr.page_fault\"\naction = \"fail\"\nskip = 6\ntimes = 1\n");
    let [planned] = plan.rules() else { panic!("one rule") };
    assert_eq!(
        (planned.rule.point.as_str(), planned.rule.skip, planned.rule.times),
        ("mr.page_fault", 6, Some(1))
    );
    assert!(matches!(planned.rule.action, Action::Fail));
    assert_eq!((planned.line, &planned.process), (1, &None));
}

#[test]
fn every_word_is_read() {
    let plan = read(
        "seed = 9\n# two\n[[rule]]\npoint = 'link.receive'\naction = 'delay'\ndelay = '5ms'\nskip = 1\ninterval = 2\n\
         probability = 12.5\ntimes = -1\ndirection = 'receive'\nopcode = 'write'\nqp = 0x11\nprocess = 'ib_write_bw'\n\
         [[rule]]\npoint = 'mr.page_fault'\nkey = 0xffffffff\nmemory = [0x1000, 0x2000]\n\
         [[rule]]\npoint = 'mr.pages_in'\npage = 'hugetlb'\n",
    );
    let [first, second, third] = plan.rules() else { panic!("three rules") };
    let rule = &first.rule;
    assert!(matches!(rule.action, Action::Delay(time) if time == Duration::from_millis(5)));
    assert_eq!((rule.skip, rule.interval, rule.times), (1, 2, None));
    assert!((rule.probability - 0.125).abs() < 1e-9);
    assert_eq!(rule.only.direction, Some(Direction::Receive));
    assert_eq!((rule.only.opcode.as_deref(), rule.only.qpn.map(|qpn| qpn.0)), (Some("write"), Some(0x11)));
    assert_eq!((first.process.as_deref(), first.line, second.line), (Some("ib_write_bw"), 3, 15));
    assert_eq!(second.rule.only.key.map(|key| key.0), Some(u32::MAX));
    assert_eq!(second.rule.only.memory, Some(0x1000..0x2000));
    assert_eq!(third.rule.only.page, Some("hugetlb"));
}

#[test]
fn a_wrong_plan_is_refused_at_the_word_that_is_wrong() {
    let rule = "[[rule]]\npoint = \"mr.page_fault\"\n";
    let packets = "[[rule]]\npoint = \"link.send\"\n";
    let cases: [(String, &str, &str); 23] = [
        ("[[rule]\n".into(), "", ""),
        (format!("{rule}page = \"hugetlb\"\n"), "\"hugetlb\"", "page"),
        ("[[rule]]\npoint = \"mr.pages_in\"\npage = \"huge\"\n".into(), "\"huge\"", "one of"),
        (String::new(), "", "without rules"),
        ("[[rule]]\naction = \"fail\"\n".into(), "[[rule]]", "without `point`"),
        ("[[rules]]\npoint = \"mr.page_fault\"\n".into(), "rules", "means nothing"),
        (format!("{rule}skp = 1\n"), "skp", "means nothing"),
        (format!("{rule}skip = \"6\"\n"), "\"6\"", "an integer, not a string"),
        (format!("{rule}skip = -1\n"), "-1", "0 to"),
        (format!("{rule}interval = 0\n"), "0", "1 to"),
        (format!("{rule}times = -2\n"), "-2", "-1 to"),
        (format!("{rule}probability = 101\n"), "101", "0 to 100"),
        (format!("{rule}probability = nan\n"), "nan", "0 to 100"),
        (format!("{rule}action = \"explode\"\n"), "\"explode\"", "one of fail, delay"),
        (format!("{rule}action = \"delay\"\n"), "[[rule]]", "without `delay`"),
        (format!("{rule}delay = \"1s\"\n"), "\"1s\"", "goes with"),
        (format!("{rule}action = \"delay\"\ndelay = \"1 s\"\n"), "\"1 s\"", "no time"),
        (format!("{rule}action = \"delay\"\ndelay = \"11s\"\n"), "\"11s\"", "no time"),
        ("[[rule]]\npoint = \"mr.pagefault\"\n".into(), "\"mr.pagefault\"", "no fault point"),
        ("[[rule]]\npoint = \"mr.publish\"\n".into(), "\"mr.publish\"", "cannot fail"),
        (format!("{packets}key = 1\n"), "1", "nothing is known"),
        (format!("{packets}opcode = \"wirte\"\n"), "\"wirte\"", "one of"),
        (format!("{rule}memory = [0x2000, 0x1000]\n"), "[0x2000, 0x1000]", "two addresses"),
    ];
    for (text, at, says) in cases {
        let error = Plan::read(&text).expect_err(&text);
        assert!(
            text[error.span.clone()].starts_with(at),
            "{text}: points at {:?}",
            &text[error.span.clone()]
        );
        assert!(error.to_string().contains(says), "{text}: {error}");
    }
}

#[test]
fn a_slip_of_the_pen_is_guessed() {
    let help = |text: &str| Plan::read(text).expect_err("a slip").help().unwrap_or_default();
    assert_eq!(help("[[rule]]\npoint = \"mr.pagefault\"\n"), "did you mean `mr.page_fault`?");
    assert_eq!(help("[[rule]]\npoint = \"mr.page_fault\"\nskp = 1\n"), "did you mean `skip`?");
    assert!(help("[[rule]]\npoint = \"xyzzy\"\n").contains("link.send"));
}

#[test]
fn each_process_has_the_rules_that_are_for_it_and_counts_them_by_their_number() {
    let plan = read(
        "[[rule]]\npoint = 'link.send'\nprocess = 'one'\n[[rule]]\npoint = 'link.send'\nprocess = 'two'\n[[rule]]\n\
         point = 'link.receive'\n",
    );
    let numbers =
        |name| plan.for_process(name).fired().into_iter().map(|(number, _)| number).collect::<Vec<_>>();
    assert_eq!((numbers("one"), numbers("two"), numbers("three")), (vec![0, 2], vec![1, 2], vec![2]));
}

#[test]
fn every_point_has_its_own_name() {
    let mut names: Vec<_> = points().iter().map(|point| point.name()).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}
