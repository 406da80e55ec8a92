//! What is wrong with a plan, and where.

use std::ops::Range;

/// A plan that cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{wrong}")]
pub struct PlanError {
    /// What is wrong.
    pub wrong: Wrong,
    /// The bytes of the file that say it.
    pub span: Range<usize>,
}

/// What is wrong with a plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Wrong {
    /// It is no TOML.
    #[error("{message}")]
    Syntax {
        /// What the parser says.
        message: String,
    },
    /// There is nothing to do.
    #[error("a plan without rules does nothing")]
    NoRules,
    /// A word that means nothing here.
    #[error("`{word}` means nothing here")]
    UnknownWord {
        /// The word.
        word: String,
        /// Those that mean something.
        known: Vec<String>,
    },
    /// A word that a rule cannot do without.
    #[error("a rule without `{word}`")]
    Missing {
        /// The word.
        word: &'static str,
    },
    /// A value of another type.
    #[error("`{word}` is {wanted}, not {found}")]
    WrongType {
        /// The word.
        word: &'static str,
        /// What it is.
        wanted: &'static str,
        /// What stands there.
        found: &'static str,
    },
    /// A number that is too small or too large.
    #[error("`{word}` is {min} to {max}, not {value}")]
    OutOfRange {
        /// The word.
        word: &'static str,
        /// What stands there.
        value: String,
        /// The smallest.
        min: String,
        /// The largest.
        max: String,
    },
    /// One of a few words was wanted.
    #[error("`{word}` is one of {}, not `{value}`", .known.join(", "))]
    UnknownValue {
        /// The word.
        word: &'static str,
        /// What stands there.
        value: String,
        /// What it can be.
        known: Vec<String>,
    },
    /// No such place in the code.
    #[error("there is no fault point `{point}`")]
    UnknownPoint {
        /// As written.
        point: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The place decides about order only.
    #[error("`{point}` cannot fail, only be delayed")]
    CannotFail {
        /// The point.
        point: String,
    },
    /// The place never knows what is asked of it.
    #[error("nothing is known of `{word}` at `{point}`, so the rule would never fire")]
    NotKnownThere {
        /// What is asked.
        word: &'static str,
        /// The point.
        point: String,
    },
    /// Two words that contradict each other, or one that is of no use without another.
    #[error("`{word}` goes with action = \"{action}\" only")]
    OnlyWith {
        /// The word.
        word: &'static str,
        /// The action that it belongs to.
        action: &'static str,
    },
    /// A time that cannot be read.
    #[error("`{value}` is no time: a number with ns, us, ms or s, at most 10s")]
    BadTime {
        /// As written.
        value: String,
    },
    /// Addresses that are no range.
    #[error("`memory` is two addresses, the first and the one after the last, not {value}")]
    BadRange {
        /// As written.
        value: String,
    },
}

impl PlanError {
    /// What to write instead, where that can be guessed.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        let (word, known) = match &self.wrong {
            Wrong::UnknownWord { word, known } | Wrong::UnknownValue { value: word, known, .. } => {
                (word, known)
            }
            Wrong::UnknownPoint { point, known } => (point, known),
            Wrong::Missing { word: "point" } => {
                return Some("point = \"mr.page_fault\", for example".to_owned());
            }
            Wrong::Missing { word: "delay" } => return Some("delay = \"5ms\", for example".to_owned()),
            Wrong::NoRules => return Some("a rule begins with [[rule]]".to_owned()),
            _ => return None,
        };
        let nearest = known.iter().min_by_key(|candidate| distance(word, candidate))?;
        if distance(word, nearest) <= word.len().div_ceil(3) {
            Some(format!("did you mean `{nearest}`?"))
        } else {
            Some(format!("known are {}", known.join(", ")))
        }
    }
}

/// Letters to add, take away or change to make one word of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (above, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], above + 1);
        for (at, known) in other.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *known);
            diagonal = row[at + 1];
            row[at + 1] = changed.min(diagonal + 1).min(row[at] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn the_distance_of_two_words_counts_letters() {
        assert_eq!((distance("", ""), distance("a", ""), distance("", "abc")), (0, 1, 3));
        assert_eq!(
            (distance("skip", "skip"), distance("skp", "skip"), distance("tiems", "times")),
            (0, 1, 2)
        );
    }
}
