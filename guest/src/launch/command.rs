//! A command, checked and in the form that the kernel takes.
//!
//! # Invariants
//! 1. No string holds a NUL, and the environment names each variable once.
//! 2. `PATH`, `HOSTNAME`, `HOME` and `USER` are there, unless the user has no name; with a terminal,
//!    `TERM` too.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;

use libc::c_char;
use matchlock_wire::message::{Bytes, ExecFailure, ExecFailureKind, ExecStart, TerminalSize};

use super::diagnose::quote;
use super::user::{self, Identity};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What every program knows how to talk to.
const DEFAULT_TERM: &[u8] = b"xterm";

/// A command that is ready to be cloned.
#[derive(Debug)]
pub struct Command {
    argv: Vec<CString>,
    env: Vec<CString>,
    path: Vec<u8>,
    cwd: CString,
    identity: Identity,
    stdin: bool,
    terminal: Option<TerminalSize>,
}

impl Command {
    /// Checks a request, resolves its user and makes its working directory.
    ///
    /// # Errors
    /// When one of them is of no use; the failure says which.
    pub fn prepare(start: &ExecStart) -> Result<Self, ExecFailure> {
        let argv = arguments(&start.argv)?;
        let identity = user::resolve(Path::new("/"), start.user.as_deref())
            .map_err(|message| ExecFailure { kind: ExecFailureKind::User, message })?;
        let terminal = start.terminal.as_ref();
        let term = terminal.map(|terminal| terminal.term.as_deref().map(str::as_bytes));
        let term = term.map(|given| given.unwrap_or(DEFAULT_TERM));
        let (env, path) = environment(&start.env, &identity, term)?;
        let cwd = working_directory(start.cwd.as_deref())?;
        let terminal = terminal.map(|terminal| terminal.size);
        Ok(Self { argv, env, path, cwd, identity, stdin: start.stdin, terminal })
    }

    /// The size of its terminal, if it is to have one.
    pub fn terminal(&self) -> Option<TerminalSize> {
        self.terminal
    }

    /// Whether the host sends stdin.
    pub fn has_stdin(&self) -> bool {
        self.stdin
    }

    /// The command's name as it was given.
    pub fn name(&self) -> &CStr {
        self.argv.first().map_or(c"", CString::as_c_str)
    }

    /// Where to search for the name; `None` if it is a path.
    pub fn search_path(&self) -> Option<&[u8]> {
        (!self.name().to_bytes().contains(&b'/')).then_some(self.path.as_slice())
    }

    /// The files that the name may stand for, in order.
    pub fn candidates(&self) -> impl Iterator<Item = PathBuf> {
        let cwd = Path::new(OsStr::from_bytes(self.cwd.to_bytes()));
        let name = OsStr::from_bytes(self.name().to_bytes());
        // One path is one candidate in the directory "", which joining leaves as it is.
        let directories = self.search_path().unwrap_or_default();
        directories
            .split(|byte| *byte == b':')
            .map(move |directory| cwd.join(OsStr::from_bytes(directory)).join(name))
    }

    pub(super) fn cwd(&self) -> &CStr {
        &self.cwd
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn argv_pointers(&self) -> Vec<*const c_char> {
        pointers(&self.argv)
    }

    pub(super) fn env_pointers(&self) -> Vec<*const c_char> {
        pointers(&self.env)
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    let strings = strings.iter().map(|string| string.as_ptr());
    strings.chain([ptr::null()]).collect()
}

fn wrong(message: String) -> ExecFailure {
    ExecFailure { kind: ExecFailureKind::Request, message }
}

fn arguments(argv: &[Bytes]) -> Result<Vec<CString>, ExecFailure> {
    match argv.first() {
        None => return Err(wrong("there is no command".to_owned())),
        Some(name) if name.0.is_empty() => {
            return Err(wrong("the command's name is empty".to_owned()));
        }
        Some(_) => {}
    }
    let argument = |(index, bytes): (usize, &Bytes)| {
        CString::new(bytes.0.as_slice())
            .map_err(|_| wrong(format!("argument {index} has a NUL byte")))
    };
    argv.iter().enumerate().map(argument).collect()
}

/// The environment in the kernel's form, and its `PATH`.
fn environment(
    env: &[(Bytes, Bytes)],
    identity: &Identity,
    term: Option<&[u8]>,
) -> Result<(Vec<CString>, Vec<u8>), ExecFailure> {
    let name = identity.name.as_deref();
    let host = rustix::system::uname().nodename().to_bytes().to_vec();
    let defaults = [
        (b"PATH".as_slice(), Some(DEFAULT_PATH)),
        (b"HOSTNAME", Some(host.as_slice())),
        (b"HOME", Some(identity.home.as_slice())),
        (b"USER", name),
        (b"TERM", term),
    ];
    let defaults = defaults.into_iter().filter_map(|(k, v)| Some((k, v?)));
    let given = env.iter().map(|(k, v)| (k.0.as_slice(), v.0.as_slice()));
    let mut order: Vec<(&[u8], &[u8])> = Vec::new();
    let mut places: HashMap<&[u8], usize> = HashMap::new();
    for (name, value) in defaults.chain(given) {
        if name.is_empty() || name.contains(&b'=') {
            return Err(wrong(format!("{} is no name of an environment variable", quote(name))));
        }
        match places.get(name).and_then(|place| order.get_mut(*place)) {
            Some(entry) => entry.1 = value,
            None => {
                places.insert(name, order.len());
                order.push((name, value));
            }
        }
    }
    let path = places
        .get(b"PATH".as_slice())
        .and_then(|place| order.get(*place))
        .map_or_else(Vec::new, |(_, value)| value.to_vec());
    let entry = |(name, value): &(&[u8], &[u8])| {
        CString::new([name, b"=".as_slice(), value].concat())
            .map_err(|_| wrong(format!("the environment variable {} has a NUL byte", quote(name))))
    };
    let entries = order.iter().map(entry).collect::<Result<_, _>>()?;
    Ok((entries, path))
}

/// The working directory, made if it is missing. The child enters it.
fn working_directory(cwd: Option<&str>) -> Result<CString, ExecFailure> {
    let cwd = cwd.filter(|cwd| !cwd.is_empty()).unwrap_or("/");
    let path = Path::new("/").join(cwd);
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| wrong("the working directory has a NUL byte".to_owned()))?;
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(&path).map_err(|error| ExecFailure {
                kind: ExecFailureKind::WorkingDirectory,
                message: format!("cannot make the working directory {cwd:?}: {error}"),
            })?;
        }
        // Whatever else is wrong with it, the child finds out when it enters.
        _ => {}
    }
    Ok(c_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            uid: 7,
            gid: 7,
            groups: vec![],
            name: Some(b"me".to_vec()),
            home: b"/me".to_vec(),
        }
    }

    fn env(pairs: &[(&str, &str)]) -> Result<(Vec<String>, String), ExecFailure> {
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let (entries, path) = environment(&pairs, &identity(), None)?;
        let text = |entry: CString| entry.into_string().unwrap();
        Ok((entries.into_iter().map(text).collect(), String::from_utf8(path).unwrap()))
    }

    #[test]
    fn defaults_are_filled_in_and_later_entries_win() {
        let (entries, path) = env(&[]).unwrap();
        let default = String::from_utf8(DEFAULT_PATH.to_vec()).unwrap();
        let host = format!("HOSTNAME={}", rustix::system::uname().nodename().to_str().unwrap());
        assert_eq!(entries, [&*format!("PATH={default}"), &host, "HOME=/me", "USER=me"]);
        assert_eq!(path, default);
        let (entries, path) =
            env(&[("A", "1"), ("PATH", "/x"), ("A", "2=3"), ("HOME", ""), ("PATH", "/y")]).unwrap();
        assert_eq!(entries, ["PATH=/y", &host, "HOME=", "USER=me", "A=2=3"]);
        assert_eq!(path, "/y");
    }

    #[test]
    fn a_user_without_a_name_has_no_user_variable() {
        let mut nameless = identity();
        nameless.name = None;
        let (entries, _) = environment(&[], &nameless, None).unwrap();
        assert!(!entries.iter().any(|entry| entry.to_bytes().starts_with(b"USER=")), "{entries:?}");
    }

    #[test]
    fn a_terminal_names_itself_unless_the_environment_does() {
        let names = |given: &[(Bytes, Bytes)]| {
            let (entries, _) = environment(given, &identity(), Some(b"vt100")).unwrap();
            let is_term = |entry: &CString| entry.to_bytes().starts_with(b"TERM=");
            entries.into_iter().filter(is_term).collect::<Vec<_>>()
        };
        assert_eq!(names(&[]), [c"TERM=vt100".to_owned()]);
        assert_eq!(names(&[("TERM".into(), "dumb".into())]), [c"TERM=dumb".to_owned()]);
    }

    #[test]
    fn bad_names_and_nul_bytes_are_refused() {
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "\0")] {
            let failure = env(&[(name, value)]).unwrap_err();
            assert_eq!(failure.kind, ExecFailureKind::Request, "{name:?}={value:?}");
        }
        for argv in [vec![], vec![""], vec!["a\0"], vec!["a", "b\0"]] {
            let argv: Vec<Bytes> = argv.into_iter().map(Bytes::from).collect();
            let failure = arguments(&argv).unwrap_err();
            assert_eq!(failure.kind, ExecFailureKind::Request, "{argv:?}");
        }
    }
}
