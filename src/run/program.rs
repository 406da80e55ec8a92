//! The program that is started: where it is, and which libibverbs it was linked with.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No such file, or one that is not executable.
    #[error("{} is not a program: it is in no directory of PATH", .name.to_string_lossy())]
    NotFound {
        /// As given.
        name: OsString,
    },
    /// The operating system refused.
    #[error("{} cannot be started: {reason}", .path.display())]
    Refused {
        /// The program.
        path: PathBuf,
        /// What it said.
        reason: std::io::Error,
    },
}

/// The number of the private symbol version where the system's library does not say another.
const USUAL_NODE: u32 = 34;
/// What its name begins with.
const NODE_NAME: &[u8] = b"IBVERBS_PRIVATE_";
/// Where libraries are, after LD_LIBRARY_PATH.
const LIBRARY_DIRECTORIES: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/lib",
];

/// The file of a program, as execvp(3) finds it.
pub(super) fn find(name: &OsStr) -> Result<PathBuf, ProgramError> {
    let executable = |path: &Path| {
        fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    let not_found = || ProgramError::NotFound { name: name.to_owned() };
    if Path::new(name).components().count() > 1 {
        let path = PathBuf::from(name);
        return if executable(&path) { Ok(path) } else { Err(not_found()) };
    }
    let directories = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&directories)
        .map(|folder| folder.join(name))
        .find(|path| executable(path))
        .ok_or_else(not_found)
}

/// The number of the private symbol version that the program's libraries ask for: each distribution has its own, and a
/// library without it is refused by the dynamic linker.
pub(super) fn private_node(program: Option<&Path>) -> u32 {
    let set = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let directories = std::env::split_paths(&set).chain(LIBRARY_DIRECTORIES.map(PathBuf::from));
    let libraries = directories.map(|directory| directory.join("libibverbs.so.1"));
    let mut files = program.map(Path::to_owned).into_iter().chain(libraries);
    files.find_map(|file| node_in(&fs::read(file).ok()?)).unwrap_or(USUAL_NODE)
}

/// The number after the first name of a private version in a file.
fn node_in(file: &[u8]) -> Option<u32> {
    let at = file.windows(NODE_NAME.len()).position(|part| part == NODE_NAME)? + NODE_NAME.len();
    let digits = file[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&file[at..at + digits]).ok()?.parse().ok()
}

/// Takes the place of this process. Comes back only if that is refused.
pub(super) fn replace(
    path: &Path,
    arguments: &[OsString],
    variables: &[(&'static str, OsString)],
) -> ProgramError {
    let reason = command(path, arguments, variables).exec();
    ProgramError::Refused { path: path.to_owned(), reason }
}

/// How to start a program.
pub(super) fn command(
    path: &Path,
    arguments: &[OsString],
    variables: &[(&'static str, OsString)],
) -> Command {
    let mut command = Command::new(path);
    let name = arguments.first().map_or(path.as_os_str(), OsString::as_os_str);
    command.arg0(name).args(&arguments[1..]).envs(variables.iter().map(|(name, value)| (name, value)));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_the_private_version_is_read_from_a_file() {
        assert_eq!(node_in(b"\0IBVERBS_1.1\0IBVERBS_PRIVATE_34\0libc.so.6"), Some(34));
        assert_eq!(node_in(b"IBVERBS_PRIVATE_57"), Some(57));
        for file in [
            &b""[..],
            b"IBVERBS_1.1",
            b"IBVERBS_PRIVATE_",
            b"IBVERBS_PRIVATE_x",
            b"IBVERBS_PRIVATE_99999999999",
        ] {
            assert_eq!(node_in(file), None, "{file:?}");
        }
    }

    #[test]
    fn a_program_is_found_as_a_shell_finds_it() {
        assert!(find(OsStr::new("sh")).is_ok_and(|path| path.is_absolute()));
        assert!(find(OsStr::new("/bin/sh")).is_ok());
        for name in ["no-such-program-of-ours", "/etc/passwd", "/no/such/file", "./"] {
            assert!(find(OsStr::new(name)).is_err(), "{name}");
        }
    }
}
