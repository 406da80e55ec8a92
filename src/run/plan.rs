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
