//! The fault plan's file, read before anything is started, so that a wrong one is told with its line and word.

use hw_model::sync::Arc;
use miette::{NamedSource, SourceSpan};
use mr::plan::{Plan, PlanError};
use std::path::{Path, PathBuf};

/// Why a plan cannot be followed.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum PlanFileError {
    /// No such file, or not ours to read.
    #[error("{} cannot be read: {reason}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: std::io::Error,
    },
    /// It is wrong.
    #[error("the fault plan is wrong")]
    Wrong {
        /// The whole file.
        #[source_code]
        file: Arc<NamedSource<String>>,
        /// Where.
        #[label("{error}")]
        at: SourceSpan,
        /// What.
        error: Box<PlanError>,
        /// What to write instead.
        #[help]
        help: Option<String>,
    },
}

/// Reads a plan.
pub(super) fn read(path: &Path) -> Result<Plan, PlanFileError> {
    let unreadable = |reason| PlanFileError::Unreadable { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    Plan::read(&text).map_err(|error| PlanFileError::Wrong {
        at: error.span.clone().into(),
        help: error.help(),
        file: Arc::new(NamedSource::new(path.display().to_string(), text)),
        error: Box::new(error),
    })
}

#[cfg(test)]
mod tests {
    use mr::plan::{Plan, WORDS};

    #[test]
    fn the_schema_knows_the_words_of_a_rule_and_no_others() {
        let schema: serde_json::Value =
            serde_json::from_str(include_str!("../../docs/plan.schema.json")).expect("JSON");
        let properties = schema["$defs"]["rule"]["properties"].as_object().expect("properties");
        let mut words = WORDS.to_vec();
        words.sort_unstable();
        let mut described: Vec<_> = properties.keys().map(String::as_str).collect();
        described.sort_unstable();
        assert_eq!(described, words);
    }

    #[test]
    fn the_plan_of_the_documentation_is_one() {
        let documentation = include_str!("../../docs/run.md");
        let example = documentation.split("```toml").nth(1).and_then(|rest| rest.split("```").next());
        let plan = Plan::read(example.expect("an example")).expect("a plan");
        assert_eq!(plan.rules().len(), 1);
    }
}
