//! What the library is told, in environment variables.

use super::{Args, LinkChoice};
use std::ffi::{OsStr, OsString};
use std::path::Path;

/// Where each process leaves its report.
pub(super) const REPORT: &str = "ANYPAGE_REPORT";

/// The variables, in the order in which they are shown. The library itself reads those that begin with `ANYPAGE_`.
pub(super) fn variables(args: &Args, library: &Path) -> Vec<(&'static str, OsString)> {
    let mut variables = vec![
        ("LD_LIBRARY_PATH", search_path(library, std::env::var_os("LD_LIBRARY_PATH"))),
        ("ANYPAGE_DEVICES", args.devices.to_string().into()),
        ("ANYPAGE_RUNG", args.rung.word().into()),
    ];
    if args.link == LinkChoice::Udp {
        variables.push(("ANYPAGE_LINK", "udp".into()));
    }
    if args.cold {
        variables.push(("ANYPAGE_COLD", "1".into()));
    }
    // The program may change its directory before it opens a device.
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).into();
    if let Some(plan) = &args.plan {
        variables.push(("ANYPAGE_PLAN", absolute(plan)));
    }
    if let Some(pcap) = &args.pcap {
        variables.push(("ANYPAGE_PCAP", absolute(pcap)));
    }
    variables
}

/// Our directory before those that were there.
fn search_path(library: &Path, before: Option<OsString>) -> OsString {
    let mut path = library.as_os_str().to_owned();
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        path.push(":");
        path.push(before);
    }
    path
}

/// A value as a shell reads it back.
pub(super) fn quoted(value: &OsStr) -> String {
    let text = value.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+,@".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_directory_comes_before_those_that_were_there() {
        let ours = Path::new("/a/b");
        assert_eq!(search_path(ours, None), "/a/b");
        assert_eq!(
            search_path(ours, Some(OsString::new())),
            "/a/b",
            "an empty part would mean this directory"
        );
        assert_eq!(search_path(ours, Some("/c:/d".into())), "/a/b:/c:/d");
    }

    #[test]
    fn a_shell_reads_back_what_is_printed() {
        assert_eq!(quoted(OsStr::new("/a/b:c_d-1")), "/a/b:c_d-1");
        assert_eq!(quoted(OsStr::new("a b")), "'a b'");
        assert_eq!(quoted(OsStr::new("it's")), r"'it'\''s'");
        assert_eq!(quoted(OsStr::new("")), "''");
    }
}
