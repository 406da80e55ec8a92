//! The modelled device against rdma_rxe: the cases of tests/lab/cases/cases.c, asked of the model, held against what
//! rdma_rxe answered (tests/lab/cases/expected.jsonl, which tests/lab/checks/compare holds against today's kernel).
//!
//! Every difference stands in docs/rxe.md with the section of the specification that says who is right. One that does not,
//! and one that stands there and is none, fails.

mod bed;
mod cases;

use std::collections::BTreeMap;

/// What rdma_rxe answered, by case.
fn recorded() -> BTreeMap<String, String> {
    let lines = include_str!("../lab/cases/expected.jsonl").lines();
    lines
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("a JSON line a case");
            let field = |name: &str| line[name].as_str().expect("case and answer are text").to_owned();
            (field("case"), field("answer"))
        })
        .collect()
}

/// The rows of the table of differences: case, what rdma_rxe answers, what the model does.
fn documented() -> BTreeMap<String, (String, String)> {
    let rows = include_str!("../../docs/rxe.md").lines().filter(|line| line.starts_with("| "));
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let rows = cells.filter(|cells| cells.len() == 6 && cells[1] != "case" && !cells[1].starts_with("---"));
    rows.map(|cells| {
        assert!(cells[4].contains("IBTA") || cells[4].contains("rxe_"), "{}: who says so?", cells[1]);
        (cells[1].to_owned(), (cells[2].to_owned(), cells[3].to_owned()))
    })
    .collect()
}

#[test]
fn every_difference_between_the_model_and_rdma_rxe_is_explained() {
    let hca = bed::device();
    let mut answers = cases::Answers::new();
    cases::keys(&hca, &mut answers);
    cases::windows(&hca, &mut answers);
    cases::completion_queues(&hca, &mut answers);
    cases::tables_and_lives(&hca, &mut answers);
    cases::states(&hca, &mut answers);

    let (recorded, mut documented) = (recorded(), documented());
    let asked: Vec<&String> = answers.iter().map(|(case, _)| case).collect();
    let unasked: Vec<_> = recorded.keys().filter(|case| !asked.contains(case)).collect();
    assert!(unasked.is_empty(), "cases that the model was not asked: {unasked:#?}");
    let mut wrong = Vec::new();
    let (mut same, mut explained) = (0, 0);
    for (case, model) in &answers {
        let Some(rxe) = recorded.get(case) else {
            wrong.push(format!("{case}: rdma_rxe was not asked"));
            continue;
        };
        match documented.remove(case) {
            None if rxe == model => same += 1,
            None => wrong.push(format!("| {case} | {rxe} | {model} |")),
            Some((said, ours)) if said == *rxe && ours == *model && rxe != model => explained += 1,
            Some(row) => wrong.push(format!("{case}: the table says {row:?}, it is {rxe} and {model}")),
        }
    }
    wrong.extend(documented.into_keys().map(|case| format!("{case}: in the table, and no case")));
    let count = answers.len();
    println!("COMPARE cases {count}, same {same}, explained {explained}, unexplained {}", wrong.len());
    assert!(wrong.is_empty(), "unexplained:\n{}", wrong.join("\n"));
    assert!(count >= 60, "fewer cases than asked for");
}
