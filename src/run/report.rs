//! What the processes of a run left behind: which rules fired, and what their devices counted.

use mr::plan::Plan;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One process's report, as the library writes it (`verbs-abi/src/report.rs`).
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    process: u32,
    program: String,
    rung: String,
    ended: bool,
    rules: BTreeMap<usize, u64>,
    counts: Vec<(String, u64)>,
}

/// Every report in a directory, in the order of their processes.
pub(super) fn collect(directory: &Path) -> Vec<Left> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let report = |entry: fs::DirEntry| {
        let process = entry.file_name().to_str()?.parse().ok()?;
        Some(Left { process, ..parse(&fs::read_to_string(entry.path()).ok()?) })
    };
    let mut left: Vec<Left> = entries.filter_map(report).collect();
    left.sort_by_key(|left| left.process);
    left
}

fn parse(text: &str) -> Left {
    let mut left = Left::default();
    for line in text.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let pair = rest.split_once(' ');
        match word {
            "program" => left.program = rest.to_owned(),
            "rung" => left.rung = rest.to_owned(),
            "ended" => left.ended = true,
            "rule" => {
                let numbers = pair.and_then(|(rule, fired)| {
                    Some((rule.parse::<usize>().ok()?, fired.parse::<u64>().ok()?))
                });
                left.rules.extend(numbers);
            }
            "count" => {
                left.counts.extend(
                    pair.and_then(|(name, count)| Some((name.to_owned(), count.parse::<u64>().ok()?))),
                );
            }
            _ => {}
        }
    }
    left
}

/// Says what each process's devices counted, leaving out what they did not meet.
pub(super) fn print_counts(left: &[Left]) {
    for left in left {
        let end = if left.ended { "" } else { ", which ended without a report" };
        anstream::eprintln!("anypage: process {} ({}), rung {}{end}", left.process, left.program, left.rung);
        for (name, count) in left.counts.iter().filter(|(_, count)| *count > 0) {
            anstream::eprintln!("anypage:   {name} {count}");
        }
    }
    if left.is_empty() {
        anstream::eprintln!("anypage: no process opened a device");
    }
}

/// Says how often each rule fired, over all processes. Whether every one did.
pub(super) fn print_fired(plan: &Plan, left: &[Left]) -> bool {
    let mut all = true;
    for (number, planned) in plan.rules().iter().enumerate() {
        let fired: u64 = left.iter().filter_map(|left| left.rules.get(&number)).sum();
        all &= fired > 0;
        let never = if fired == 0 { ": it never fired" } else { "" };
        let (line, point) = (planned.line, &planned.rule.point);
        anstream::eprintln!("anypage: rule {} (line {line}, {point}) fired {fired} times{never}", number + 1);
    }
    for left in left.iter().filter(|left| !left.ended) {
        anstream::eprintln!(
            "anypage: process {} ({}) was killed, so what fired there is unknown",
            left.process,
            left.program
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_the_library_writes_it() {
        let text = "program ib_write_bw\nended\nrung exact\nrule 0 1\nrule 2 7\ncount packets_sent 12\n";
        let expected = Left {
            program: "ib_write_bw".into(),
            rung: "exact".into(),
            ended: true,
            rules: BTreeMap::from([(0, 1), (2, 7)]),
            counts: vec![("packets_sent".into(), 12)],
            ..Left::default()
        };
        assert_eq!(parse(text), expected);
        assert_eq!(parse("rule x 1\nrule 1\ncount\nnonsense 1 2 3\n"), Left::default());
    }

    #[test]
    fn a_rule_that_fired_in_any_process_has_fired() {
        let text = "[[rule]]\npoint = 'link.send'\n[[rule]]\npoint = 'link.receive'\n";
        let plan = Plan::read(text).expect("a plan");
        let left =
            |rules: &[(usize, u64)]| Left { rules: rules.iter().copied().collect(), ..Left::default() };
        assert!(print_fired(&plan, &[left(&[(0, 0), (1, 3)]), left(&[(0, 1)])]));
        assert!(!print_fired(&plan, &[left(&[(0, 1), (1, 0)])]));
        assert!(!print_fired(&plan, &[]));
    }
}
