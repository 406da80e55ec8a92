//! A table of TOML whose words are taken one by one, so that what is left is what means nothing.

use super::error::{PlanError, Wrong};
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where something stands.
pub(super) type Span = Range<usize>;

/// Parses a file.
pub(super) fn parse(text: &str) -> Result<DeTable<'_>, PlanError> {
    match DeTable::parse(text) {
        Ok(table) => Ok(table.into_inner()),
        Err(error) => {
            let wrong = Wrong::Syntax { message: error.message().to_owned() };
            Err(PlanError { wrong, span: error.span().unwrap_or(0..0) })
        }
    }
}

/// The words of a table that have not been taken.
pub(super) struct Table<'a> {
    entries: Vec<(&'a str, Span, &'a Spanned<DeValue<'a>>)>,
    /// Of the table itself.
    pub(super) span: Span,
}

impl<'a> Table<'a> {
    pub(super) fn new(table: &'a DeTable<'a>, span: Span) -> Self {
        let entries = table.iter().map(|(key, value)| (key.get_ref().as_ref(), key.span(), value)).collect();
        Self { entries, span }
    }

    fn take(&mut self, word: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        let at = self.entries.iter().position(|(known, ..)| *known == word)?;
        Some(self.entries.swap_remove(at).2)
    }

    /// Takes a string.
    pub(super) fn take_text(&mut self, word: &'static str) -> Result<Option<(&'a str, Span)>, PlanError> {
        let Some(value) = self.take(word) else { return Ok(None) };
        match value.get_ref() {
            DeValue::String(text) => Ok(Some((text.as_ref(), value.span()))),
            other => Err(wrong_type(word, "a string", other, value.span())),
        }
    }

    /// Takes an integer.
    pub(super) fn take_integer(&mut self, word: &'static str) -> Result<Option<(i128, Span)>, PlanError> {
        let Some(value) = self.take(word) else { return Ok(None) };
        integer(word, value).map(|number| Some((number, value.span())))
    }

    /// Takes an integer that is not negative.
    pub(super) fn take_unsigned(&mut self, word: &'static str) -> Result<Option<(u64, Span)>, PlanError> {
        let Some((value, span)) = self.take_integer(word)? else { return Ok(None) };
        let number = within(word, value, 0, u64::MAX.into(), &span)?;
        Ok(Some((u64::try_from(number).unwrap_or(u64::MAX), span)))
    }

    /// Takes a number with or without a fraction.
    pub(super) fn take_number(&mut self, word: &'static str) -> Result<Option<(f64, Span)>, PlanError> {
        let Some(value) = self.take(word) else { return Ok(None) };
        let number = match value.get_ref() {
            DeValue::Float(float) => float.as_str().parse().ok(),
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str().parse().ok(),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some((number, value.span()))),
            None => Err(wrong_type(word, "a number", value.get_ref(), value.span())),
        }
    }

    /// Takes a list of two integers.
    pub(super) fn take_pair(&mut self, word: &'static str) -> Result<Option<([i128; 2], Span)>, PlanError> {
        let Some(value) = self.take(word) else { return Ok(None) };
        let DeValue::Array(list) = value.get_ref() else {
            return Err(wrong_type(word, "a list of two addresses", value.get_ref(), value.span()));
        };
        let numbers = list.iter().map(|one| integer(word, one)).collect::<Result<Vec<_>, _>>()?;
        match numbers.as_slice() {
            &[first, second] => Ok(Some(([first, second], value.span()))),
            many => {
                let wrong = Wrong::BadRange { value: format!("{} of them", many.len()) };
                Err(PlanError { wrong, span: value.span() })
            }
        }
    }

    /// Takes a list of tables.
    pub(super) fn take_tables(&mut self, word: &'static str) -> Result<Vec<Table<'a>>, PlanError> {
        let Some(value) = self.take(word) else { return Ok(Vec::new()) };
        let DeValue::Array(list) = value.get_ref() else {
            return Err(wrong_type(word, "a list of tables: write [[rule]]", value.get_ref(), value.span()));
        };
        let table = |one: &'a Spanned<DeValue<'a>>| match one.get_ref() {
            DeValue::Table(table) => Ok(Table::new(table, one.span())),
            other => Err(wrong_type(word, "a table", other, one.span())),
        };
        list.iter().map(table).collect()
    }

    /// Refuses what has not been taken: `known` is what could have been.
    pub(super) fn nothing_else(&self, known: &[&str]) -> Result<(), PlanError> {
        // In the order of the file, not of the alphabet.
        let Some((word, span, _)) = self.entries.iter().min_by_key(|(_, span, _)| span.start) else {
            return Ok(());
        };
        let known = known.iter().map(|&word| word.to_owned()).collect();
        Err(PlanError { wrong: Wrong::UnknownWord { word: (*word).to_owned(), known }, span: span.clone() })
    }
}

fn integer(word: &'static str, value: &Spanned<DeValue<'_>>) -> Result<i128, PlanError> {
    let number = match value.get_ref() {
        DeValue::Integer(integer) => i128::from_str_radix(integer.as_str(), integer.radix()).ok(),
        _ => None,
    };
    number.ok_or_else(|| wrong_type(word, "an integer", value.get_ref(), value.span()))
}

/// `value`, if it is in bounds.
pub(super) fn within(
    word: &'static str,
    value: i128,
    min: i128,
    max: i128,
    span: &Span,
) -> Result<i128, PlanError> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    let (value, min, max) = (value.to_string(), min.to_string(), max.to_string());
    Err(PlanError { wrong: Wrong::OutOfRange { word, value, min, max }, span: span.clone() })
}

fn wrong_type(word: &'static str, wanted: &'static str, found: &DeValue<'_>, span: Span) -> PlanError {
    let found = match found {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "a truth value",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    PlanError { wrong: Wrong::WrongType { word, wanted, found }, span }
}
