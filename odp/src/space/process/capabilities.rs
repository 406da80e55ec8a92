//! What this process may do here, found out once at open, with the reason where it may not.

use super::copy::{Copier, CopyMethod};
use super::exact::Exact;
use super::mappings::Mappings;
use super::sys::{self, UserfaultFeatures};
use crate::space::Rung;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fmt;

/// How to open a [`ProcessSpace`](super::ProcessSpace). The default takes the strongest of everything; the switches
/// exist to run weaker ways on machines that offer stronger ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// No rung above this one is tried.
    pub strongest: Rung,
    /// The exact rung, where it has been installed.
    pub exact: Option<Exact>,
    /// Use PAGEMAP_SCAN if the kernel has it; else read /proc/self/pagemap, which knows neither huge pages nor zero
    /// pages.
    pub pagemap_scan: bool,
    /// Use PROCMAP_QUERY if the kernel has it; else read /proc/self/maps.
    pub procmap_query: bool,
    /// How to move bytes. `None` takes the first that works.
    pub copy: Option<CopyMethod>,
}

impl Default for Options {
    fn default() -> Self {
        Self { strongest: Rung::Exact, exact: None, pagemap_scan: true, procmap_query: true, copy: None }
    }
}

/// Why a process space cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A file of /proc is needed and is not there, or not ours to read (a process that is not dumpable, hidepid).
    #[error("{path} cannot be opened: {reason}")]
    Proc {
        /// The file.
        path: &'static str,
        /// What the kernel said.
        reason: Errno,
    },
    /// No way of copying from memory that may vanish works here.
    #[error("no safe way to copy: {method} refused: {reason}")]
    NoSafeCopy {
        /// The last method tried.
        method: CopyMethod,
        /// What the kernel said.
        reason: Errno,
    },
    /// The supervisor of the exact rung serves as many spaces as it can.
    #[error("eight spaces of this process are on the exact rung already; close one first")]
    Crowded,
    /// The monitor thread could not be started.
    #[error("the monitor thread could not be started: {reason}")]
    Thread {
        /// What the kernel said.
        reason: Errno,
    },
}

/// Whether the kernel grants something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It does.
    Yes,
    /// It was not asked: [`Options`] rule it out.
    Disabled,
    /// It answered with this error.
    Refused(Errno),
}

impl Support {
    fn of<T>(result: &Result<T, Errno>) -> Self {
        match result {
            Ok(_) => Self::Yes,
            Err(error) => Self::Refused(*error),
        }
    }

    /// Whether it is granted.
    #[must_use]
    pub fn is_yes(self) -> bool {
        self == Self::Yes
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Yes => f.write_str("yes"),
            Self::Disabled => f.write_str("not used, by option"),
            Self::Refused(reason) => write!(f, "no: {reason}"),
        }
    }
}

/// What was probed, and what is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The rung in force for memory that can be watched.
    pub rung: Rung,
    /// userfaultfd(2) with UFFD_USER_MODE_ONLY and all features needed.
    pub userfaultfd: Support,
    /// The same by way of /dev/userfaultfd; asked only if the system call refused.
    pub dev_userfaultfd: Support,
    /// PAGEMAP_SCAN (Linux 6.7).
    pub pagemap_scan: Support,
    /// PROCMAP_QUERY (Linux 6.11).
    pub procmap_query: Support,
    /// membarrier(2), private expedited: without it an engine pays a fence a burst.
    pub membarrier: Support,
    /// How bytes are moved.
    pub copy: CopyMethod,
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rung in force     {}", self.rung)?;
        writeln!(f, "userfaultfd       {}", self.userfaultfd)?;
        if !self.userfaultfd.is_yes() {
            writeln!(f, "/dev/userfaultfd  {}", self.dev_userfaultfd)?;
        }
        writeln!(f, "PAGEMAP_SCAN      {}", self.pagemap_scan)?;
        writeln!(f, "PROCMAP_QUERY     {}", self.procmap_query)?;
        writeln!(f, "membarrier        {}", self.membarrier)?;
        write!(f, "copy              {}", self.copy)
    }
}

/// What probing leaves in our hands.
pub(super) struct Tools {
    pub(super) capabilities: Capabilities,
    pub(super) userfault: Option<OwnedFd>,
    pub(super) pagemap: OwnedFd,
    pub(super) mappings: Mappings,
    pub(super) copier: Copier,
}

impl Tools {
    pub(super) fn probe(options: &Options) -> Result<Self, OpenError> {
        let exact = options.exact.is_some() && options.strongest == Rung::Exact;
        let (userfault, direct, device) =
            if exact { (None, Support::Disabled, Support::Disabled) } else { userfault(options) };
        let pagemap = open("/proc/self/pagemap")?;
        let pagemap_scan = match options.pagemap_scan {
            true => Support::of(&sys::pagemap_scan(&pagemap, 0, 0, &mut [sys::Region::default()])),
            false => Support::Disabled,
        };
        let procmap_query = match options.procmap_query {
            true => Support::of(&Mappings::probe(open("/proc/self/maps")?)),
            false => Support::Disabled,
        };
        let mappings = Mappings::open(procmap_query.is_yes())
            .map_err(|reason| OpenError::Proc { path: "/proc/self/maps", reason })?;
        let membarrier = match sys::has_membarrier() {
            Ok(true) => Support::Yes,
            Ok(false) => Support::Refused(Errno::OPNOTSUPP),
            Err(reason) => Support::Refused(reason),
        };
        let copier = copier(options.copy)?;
        let capabilities = Capabilities {
            rung: match &userfault {
                _ if exact => Rung::Exact,
                Some(_) => Rung::Events,
                None => Rung::Poll,
            },
            userfaultfd: direct,
            dev_userfaultfd: device,
            pagemap_scan,
            procmap_query,
            membarrier,
            copy: copier.method(),
        };
        Ok(Self { capabilities, userfault, pagemap, mappings, copier })
    }
}

fn open(path: &'static str) -> Result<OwnedFd, OpenError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|reason| OpenError::Proc { path, reason })
}

fn userfault(options: &Options) -> (Option<OwnedFd>, Support, Support) {
    if options.strongest > Rung::Events {
        return (None, Support::Disabled, Support::Disabled);
    }
    let with_features = |fd: OwnedFd| sys::userfault_api(&fd, UserfaultFeatures::all()).map(|()| fd);
    let direct = sys::userfaultfd().and_then(with_features);
    let first = Support::of(&direct);
    if let Ok(fd) = direct {
        return (Some(fd), first, Support::Disabled);
    }
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .and_then(sys::userfaultfd_from)
        .and_then(with_features);
    let second = Support::of(&device);
    (device.ok(), first, second)
}

fn copier(wanted: Option<CopyMethod>) -> Result<Copier, OpenError> {
    let methods = match wanted {
        Some(method) => vec![method],
        None => vec![CopyMethod::Recover, CopyMethod::SystemCall],
    };
    let mut failure = OpenError::NoSafeCopy { method: CopyMethod::Recover, reason: Errno::NOSYS };
    for method in methods {
        match Copier::new(method) {
            Ok(copier) => return Ok(copier),
            Err(reason) => failure = OpenError::NoSafeCopy { method, reason },
        }
    }
    Err(failure)
}
