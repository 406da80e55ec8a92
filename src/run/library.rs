//! The drop-in library: found beside this executable, or linked there from the archive that cargo left.
//!
//! A Rust cdylib cannot carry a version script (rustc has one of its own, and the linker takes one), and libibverbs is
//! nothing without its symbol versions. So the package `verbs-abi` is an archive, and the C compiler that Rust links with
//! makes the library of it: once a build, in about a second.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// The versions of the symbols.
const VERSION_SCRIPT: &str = include_str!("../../verbs-abi/ibverbs.map");
const NUMBER_OF_NODE: &str = "@PRIVATE@";
/// The node that the archive was written for: of one symbol, the name has the number in it.
const NODE_OF_ARCHIVE: u32 = 34;
/// What the dynamic linker looks for.
const NAME: &str = "libibverbs.so.1";

/// Why there is no library.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// Neither the library nor what it is made of.
    #[error("no {NAME} beside {}, and no libverbs_abi.a to link one from; build with `cargo build`", .executable.display())]
    NotBuilt {
        /// This executable.
        executable: PathBuf,
    },
    /// Nothing can be written where the library belongs, nor among temporary files.
    #[error("{} cannot be written: {reason}", .place.display())]
    Place {
        /// Where it was to be.
        place: PathBuf,
        /// What the operating system said.
        reason: io::Error,
    },
    /// No C compiler.
    #[error("the C compiler {} cannot be started: {reason}; set CC to one", .compiler.to_string_lossy())]
    NoCompiler {
        /// Its name.
        compiler: OsString,
        /// What the operating system said.
        reason: io::Error,
    },
    /// The C compiler failed.
    #[error("the C compiler did not link {NAME}:\n{said}")]
    NotLinked {
        /// What it said.
        said: String,
    },
}

/// The directory with a library whose private symbol version has the number `node`.
pub(super) fn provide(node: u32) -> Result<PathBuf, LibraryError> {
    let executable = std::env::current_exe()
        .map_err(|reason| LibraryError::Place { place: "/proc/self/exe".into(), reason })?;
    let home = executable.parent().unwrap_or(Path::new("/"));
    // Tests run from a folder one deeper.
    let home = if home.ends_with("deps") { home.parent().unwrap_or(home) } else { home };
    let place = home.join("verbs-abi").join(node.to_string());
    let Some((archive, built)) = archive(home) else {
        // An installed one needs no archive.
        return if place.join(NAME).exists() {
            Ok(place)
        } else {
            Err(LibraryError::NotBuilt { executable })
        };
    };
    match link_unless_there(&archive, built, node, &place) {
        Err(LibraryError::Place { .. }) => {
            // Somebody else's installation: link for ourselves.
            let user = rustix::process::getuid().as_raw();
            let own = std::env::temp_dir().join(format!("anypage-{user}")).join(node.to_string());
            link_unless_there(&archive, built, node, &own).map(|()| own)
        }
        other => other.map(|()| place),
    }
}

/// The newest archive that cargo left, and when it was made.
fn archive(home: &Path) -> Option<(PathBuf, SystemTime)> {
    let candidates =
        [home.to_owned(), home.join("deps")].into_iter().filter_map(|folder| fs::read_dir(folder).ok());
    let archives = candidates.flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let ours = name.starts_with("libverbs_abi") && name.ends_with(".a");
        ours.then_some(())?;
        Some((entry.path(), entry.metadata().ok()?.modified().ok()?))
    });
    archives.max_by_key(|(_, made)| *made)
}

/// Links the library unless the one that is there was linked from this archive: it has the archive's time then.
fn link_unless_there(archive: &Path, built: SystemTime, node: u32, place: &Path) -> Result<(), LibraryError> {
    let library = place.join(NAME);
    if fs::metadata(&library).and_then(|file| file.modified()).is_ok_and(|time| time == built) {
        return Ok(());
    }
    let refused = |reason| LibraryError::Place { place: place.to_owned(), reason };
    fs::create_dir_all(place).map_err(refused)?;
    // Others may be linking, or running with the one that is there: it is replaced whole.
    let work = tempfile::tempdir_in(place).map_err(refused)?;
    let (script, linked) = (work.path().join("ibverbs.map"), work.path().join(NAME));
    fs::write(&script, VERSION_SCRIPT.replace(NUMBER_OF_NODE, &node.to_string())).map_err(refused)?;
    link(archive, &script, node, &linked)?;
    let finish = || {
        fs::File::options().write(true).open(&linked)?.set_modified(built)?;
        fs::rename(&linked, &library)
    };
    finish().map_err(refused)
}

fn link(archive: &Path, script: &Path, node: u32, library: &Path) -> Result<(), LibraryError> {
    let compiler = std::env::var_os("CC").filter(|name| !name.is_empty()).unwrap_or_else(|| "cc".into());
    let mut version = OsString::from("-Wl,--version-script=");
    version.push(script);
    let mut command = Command::new(&compiler);
    command.arg("-shared").arg("-o").arg(library).args(["-Wl,--whole-archive".as_ref(), archive.as_os_str()]);
    command.args(["-Wl,--no-whole-archive", "-Wl,--gc-sections", "-Wl,-z,defs", "-Wl,-Bsymbolic", "-Wl,-S"]);
    command.arg(format!("-Wl,-soname,{NAME}")).arg(version);
    if node != NODE_OF_ARCHIVE {
        command.arg(format!(
            "-Wl,--defsym=verbs_register_driver_{node}=verbs_register_driver_{NODE_OF_ARCHIVE}"
        ));
    }
    command.args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lc"]);
    let output = command.output().map_err(|reason| LibraryError::NoCompiler { compiler, reason })?;
    if output.status.success() {
        Ok(())
    } else {
        Err(LibraryError::NotLinked { said: String::from_utf8_lossy(&output.stderr).into_owned() })
    }
}
