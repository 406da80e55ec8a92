//! What the environment asks for. `anypage run` sets these; `anypage run --print-env` says how to set them by hand.

use odp::space::Rung;
use std::ffi::OsString;
use std::path::PathBuf;

/// Devices that there are.
pub(crate) const DEVICES: &str = "ANYPAGE_DEVICES";
/// `exact`, `events` or `poll`: the strongest way of learning of changes of memory that is tried.
pub(crate) const RUNG: &str = "ANYPAGE_RUNG";
/// The file of a fault plan.
pub(crate) const PLAN: &str = "ANYPAGE_PLAN";
/// Set: on-demand regions begin with no page mapped, and a fault brings in what it is about and no more.
pub(crate) const COLD: &str = "ANYPAGE_COLD";
/// The beginning of the names of files that packets are written to: the process's number and the device's name follow.
pub(crate) const PCAP: &str = "ANYPAGE_PCAP";
/// `udp` or `auto`: what carries packets to another process of this host that has our library; `auto` is shared memory.
pub(crate) const LINK: &str = "ANYPAGE_LINK";
/// A directory in which each process leaves a report when it ends.
pub(crate) const REPORT: &str = "ANYPAGE_REPORT";

/// Most devices of a process.
const MOST_DEVICES: usize = 16;

/// What carries packets between processes of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkChoice {
    /// Shared memory, where both have our library.
    Auto,
    /// RoCEv2 over UDP, as between hosts.
    Udp,
}

/// What the environment asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) devices: usize,
    pub(crate) rung: Rung,
    pub(crate) link: LinkChoice,
    pub(crate) cold: bool,
    pub(crate) plan: Option<PathBuf>,
    pub(crate) pcap: Option<PathBuf>,
    pub(crate) report: Option<PathBuf>,
}

impl Settings {
    pub(crate) fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// A value that makes no sense is said on standard error, and the default holds: a library has no better place.
    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name| variable(name).map(|value| value.to_string_lossy().into_owned());
        let devices = match text(DEVICES) {
            None => 1,
            Some(value) => match value.parse() {
                Ok(count) if count <= MOST_DEVICES => count,
                _ => {
                    complain(&format!("{DEVICES}={value} is not a number from 0 to {MOST_DEVICES}; 1 it is"));
                    1
                }
            },
        };
        let rung = match text(RUNG).as_deref() {
            None | Some("events") => Rung::Events,
            Some("exact") => Rung::Exact,
            Some("poll") => Rung::Poll,
            Some(value) => {
                complain(&format!("{RUNG}={value} is none of exact, events, poll; events it is"));
                Rung::Events
            }
        };
        let link = match text(LINK).as_deref() {
            None | Some("auto") => LinkChoice::Auto,
            Some("udp") => LinkChoice::Udp,
            Some(value) => {
                complain(&format!("{LINK}={value} is none of auto, udp; auto it is"));
                LinkChoice::Auto
            }
        };
        let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cold = path(COLD).is_some();
        Self { devices, rung, link, cold, plan: path(PLAN), pcap: path(PCAP), report: path(REPORT) }
    }
}

/// Says something to whoever started the program.
pub(crate) fn complain(what: &str) {
    eprintln!("anypage: {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        Settings::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn an_empty_environment_gives_one_device_and_changes_nothing_in_the_process() {
        let expected = Settings {
            devices: 1,
            rung: Rung::Events,
            link: LinkChoice::Auto,
            cold: false,
            plan: None,
            pcap: None,
            report: None,
        };
        assert_eq!(settings(&[]), expected);
    }

    #[test]
    fn what_is_asked_for_is_heard() {
        let path = |name: &str| Some(PathBuf::from(name));
        let heard = settings(&[
            (DEVICES, "3"),
            (RUNG, "exact"),
            (LINK, "udp"),
            (COLD, "1"),
            (PLAN, "p.toml"),
            (PCAP, "c"),
            (REPORT, "/tmp"),
        ]);
        let (plan, pcap, report) = (path("p.toml"), path("c"), path("/tmp"));
        assert_eq!(
            heard,
            Settings { devices: 3, rung: Rung::Exact, link: LinkChoice::Udp, cold: true, plan, pcap, report }
        );
    }

    #[test]
    fn nonsense_leaves_the_default() {
        for value in ["-1", "17", "many", ""] {
            assert_eq!(settings(&[(DEVICES, value)]).devices, 1, "{value}");
        }
        assert_eq!(settings(&[(RUNG, "best")]).rung, Rung::Events);
        assert_eq!(settings(&[(LINK, "tcp")]).link, LinkChoice::Auto);
        assert_eq!(settings(&[(PLAN, "")]).plan, None);
    }
}
