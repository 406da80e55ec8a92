//! One rule of a plan.

use super::error::{PlanError, Wrong};
use super::table::{Span, Table, within};
use super::{PlannedRule, points};
use hw_model::fault_plan::{Action, Direction, Only, Point, Rule};
use hw_model::hca::Backing;
use hw_model::link::{OPCODES, PLANNED_POINTS};
use hw_model::wire::{Key, Qpn};
use std::time::Duration;

/// Every word of a rule.
pub const WORDS: [&str; 14] = [
    "point",
    "action",
    "delay",
    "skip",
    "interval",
    "probability",
    "times",
    "direction",
    "opcode",
    "key",
    "qp",
    "memory",
    "page",
    "process",
];
/// The longest delay: a packet or a fault that takes longer is a hang, and better made with `fail`.
const LONGEST: Duration = Duration::from_secs(10);

pub(super) fn read(text: &str, mut table: Table<'_>) -> Result<PlannedRule, PlanError> {
    let span = table.span.clone();
    let missing = |word| PlanError { wrong: Wrong::Missing { word }, span: span.clone() };
    let (name, place) = table.take_text("point")?.ok_or_else(|| missing("point"))?;
    let met = covered(name, &place)?;
    let action = action(&mut table, &span)?;
    if matches!(action, Action::Fail) && !met.iter().any(|point| point.is_fallible()) {
        return Err(PlanError { wrong: Wrong::CannotFail { point: name.to_owned() }, span: place });
    }
    let mut rule = Rule::always(name, action);
    rule.skip = table.take_unsigned("skip")?.map_or(0, |(skip, _)| skip);
    if let Some((interval, span)) = table.take_integer("interval")? {
        rule.interval = u64::try_from(within("interval", interval, 1, u64::MAX.into(), &span)?).unwrap_or(1);
    }
    if let Some((percent, span)) = table.take_number("probability")? {
        if !(0.0..=100.0).contains(&percent) {
            let (value, min, max) = (percent.to_string(), "0".to_owned(), "100".to_owned());
            return Err(PlanError {
                wrong: Wrong::OutOfRange { word: "probability", value, min, max },
                span,
            });
        }
        rule.probability = percent / 100.0;
    }
    if let Some((times, span)) = table.take_integer("times")? {
        // -1 has no limit, as in the kernel.
        rule.times = u64::try_from(within("times", times, -1, u64::MAX.into(), &span)?).ok();
    }
    rule.only = only(&mut table, name, &met)?;
    let process = table.take_text("process")?.map(|(process, _)| process.to_owned());
    table.nothing_else(&WORDS)?;
    let line = text[..span.start].matches('\n').count() + 1;
    Ok(PlannedRule { rule, process, line })
}

/// The points that a name means.
fn covered(name: &str, span: &Span) -> Result<Vec<Point>, PlanError> {
    let known = points();
    let met: Vec<Point> = match name.strip_suffix('*') {
        Some(beginning) => {
            known.iter().copied().filter(|point| point.name().starts_with(beginning)).collect()
        }
        None => known.iter().copied().filter(|point| point.name() == name).collect(),
    };
    if met.is_empty() {
        let known = known.iter().map(|point| point.name().to_owned()).collect();
        let wrong = Wrong::UnknownPoint { point: name.to_owned(), known };
        return Err(PlanError { wrong, span: span.clone() });
    }
    Ok(met)
}

fn action(table: &mut Table<'_>, rule: &Span) -> Result<Action, PlanError> {
    let action = table.take_text("action")?;
    let delay = table.take_text("delay")?;
    match (action, delay) {
        (None | Some(("fail", _)), None) => Ok(Action::Fail),
        (None | Some(("fail", _)), Some((_, span))) => {
            Err(PlanError { wrong: Wrong::OnlyWith { word: "delay", action: "delay" }, span })
        }
        (Some(("delay", _)), Some((value, span))) => time(value, &span).map(Action::Delay),
        (Some(("delay", _)), None) => {
            Err(PlanError { wrong: Wrong::Missing { word: "delay" }, span: rule.clone() })
        }
        (Some((value, span)), _) => Err(unknown_value("action", value, &["fail", "delay"], span)),
    }
}

fn unknown_value(word: &'static str, value: &str, known: &[&str], span: Span) -> PlanError {
    let known = known.iter().map(|&known| known.to_owned()).collect();
    PlanError { wrong: Wrong::UnknownValue { word, value: value.to_owned(), known }, span }
}

fn time(value: &str, span: &Span) -> Result<Duration, PlanError> {
    let digits = value.chars().take_while(char::is_ascii_digit).count();
    let (number, unit) = value.split_at(digits);
    let nanoseconds: Option<u64> = match unit {
        "ns" => Some(1),
        "us" => Some(1_000),
        "ms" => Some(1_000_000),
        "s" => Some(1_000_000_000),
        _ => None,
    };
    let time =
        nanoseconds.and_then(|unit| number.parse::<u64>().ok()?.checked_mul(unit)).map(Duration::from_nanos);
    time.filter(|time| *time <= LONGEST)
        .ok_or_else(|| PlanError { wrong: Wrong::BadTime { value: value.to_owned() }, span: span.clone() })
}

/// What is asked of the subject, and is known at some point that the rule means.
fn only(table: &mut Table<'_>, name: &str, met: &[Point]) -> Result<Only, PlanError> {
    let known = |word: &'static str, span: &Span| {
        let there = met.iter().any(|point| knows(*point, word));
        let wrong = Wrong::NotKnownThere { word, point: name.to_owned() };
        if there { Ok(()) } else { Err(PlanError { wrong, span: span.clone() }) }
    };
    let mut only = Only::default();
    if let Some((value, span)) = table.take_text("direction")? {
        known("direction", &span)?;
        let directions = [Direction::Send, Direction::Receive];
        let direction = directions.into_iter().find(|direction| direction.word() == value);
        only.direction = Some(
            direction
                .ok_or_else(|| unknown_value("direction", value, &directions.map(Direction::word), span))?,
        );
    }
    if let Some((value, span)) = table.take_text("opcode")? {
        known("opcode", &span)?;
        if !OPCODES.iter().any(|opcode| *opcode == value || opcode.starts_with(&format!("{value}_"))) {
            return Err(unknown_value("opcode", value, &OPCODES, span));
        }
        only.opcode = Some(value.to_owned());
    }
    if let Some((value, span)) = table.take_integer("key")? {
        known("key", &span)?;
        only.key = Some(Key(u32::try_from(within("key", value, 0, u32::MAX.into(), &span)?).unwrap_or(0)));
    }
    if let Some((value, span)) = table.take_integer("qp")? {
        known("qp", &span)?;
        only.qpn = Some(Qpn(u32::try_from(within("qp", value, 0, 0xff_ffff, &span)?).unwrap_or(0)));
    }
    if let Some(([first, end], span)) = table.take_pair("memory")? {
        known("memory", &span)?;
        let range = u64::try_from(first).ok().zip(u64::try_from(end).ok()).filter(|(first, end)| first < end);
        let wrong = || Wrong::BadRange { value: format!("[{first:#x}, {end:#x}]") };
        let (first, end) = range.ok_or_else(|| PlanError { wrong: wrong(), span })?;
        only.memory = Some(first..end);
    }
    if let Some((value, span)) = table.take_text("page")? {
        known("page", &span)?;
        let kinds = Backing::ALL.map(Backing::name);
        let kind = kinds.into_iter().find(|kind| *kind == value);
        only.page = Some(kind.ok_or_else(|| unknown_value("page", value, &kinds, span))?);
    }
    Ok(only)
}

/// Whether a point says what `word` asks of it.
fn knows(point: Point, word: &str) -> bool {
    let packets = PLANNED_POINTS.contains(&point);
    let there = point == crate::points::PAGES_IN;
    let faults = there || point == crate::points::PAGE_FAULT;
    match word {
        "direction" | "qp" => packets || faults,
        "opcode" => packets,
        "key" | "memory" => faults,
        "page" => there,
        _ => false,
    }
}
