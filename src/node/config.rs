//! Where things are and how long they may take: defaults < `$MATCHLOCK_HOME/config.toml` <
//! environment (< flags, which their verbs see to). Reads that file, and changes nothing.
//!
//! # On error
//! A key that is not known is refused, not ignored: a misspelt setting would silently not hold.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use matchlock_model::subnet::{InvalidPool, SubnetPool};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Deserialize;

/// The environment variable of the state directory.
pub const HOME_VARIABLE: &str = "MATCHLOCK_HOME";
/// The environment variable of the cache directory.
pub const CACHE_VARIABLE: &str = "MATCHLOCK_CACHE";
/// The environment variable of the time that a guest has to get ready, in seconds.
pub const BOOT_TIMEOUT_VARIABLE: &str = "MATCHLOCK_BOOT_TIMEOUT";
/// The environment variable of the time that removed VMs are remembered, in days.
pub const HISTORY_DAYS_VARIABLE: &str = "MATCHLOCK_HISTORY_DAYS";
/// The environment variable of the pool that subnets are taken from.
pub const SUBNET_POOL_VARIABLE: &str = "MATCHLOCK_SUBNET_POOL";
/// The name of the file with settings, in the state directory.
pub const CONFIG_FILE: &str = "config.toml";

const DEFAULT_HISTORY_DAYS: u32 = 30;

/// Where things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// `$MATCHLOCK_HOME`: state.
    pub home: PathBuf,
    /// `$MATCHLOCK_CACHE`: what can be made again.
    pub cache: PathBuf,
    /// `$MATCHLOCK_KERNEL`: a guest kernel instead of the bundle's.
    pub kernel: Option<PathBuf>,
    /// How long a guest may take to get ready; `None` means the default.
    pub boot_timeout: Option<Duration>,
    /// How many days the history of a removed VM is kept.
    pub history_days: u32,
    /// Where subnets are taken from.
    pub subnet_pool: SubnetPool,
}

/// The settings in the file, named as in it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FileConfig {
    cache: Option<PathBuf>,
    kernel: Option<PathBuf>,
    boot_timeout: Option<u64>,
    history_days: Option<u32>,
    subnet_pool: Option<String>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nothing says where to keep state.
    #[error("{variable} is not set and neither is HOME: set {variable} to a directory of yours")]
    NoHome {
        /// The variable that could say it.
        variable: &'static str,
    },
    /// A path is relative: it would mean another directory in each process.
    #[error("{setting} is {path:?}: use an absolute path")]
    Relative {
        /// Which setting, and where it stands.
        setting: String,
        /// Its value.
        path: PathBuf,
    },
    /// A number is none, or not one that makes sense.
    #[error("{setting} is {value:?}: use a whole number of {unit}")]
    Number {
        /// Which setting, and where it stands.
        setting: String,
        /// Its value.
        value: OsString,
        /// What is counted.
        unit: &'static str,
    },
    /// A subnet pool is none.
    #[error("{setting}: {reason}")]
    SubnetPool {
        /// Which setting, and where it stands.
        setting: String,
        /// What is wrong with it.
        reason: InvalidPool,
    },
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}, line {line}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
}

/// What is counted in a time that a guest has.
const SECONDS: &str = "seconds, at least 1";
/// What is counted in the time that history is kept.
const DAYS: &str = "days";

impl NodeConfig {
    /// The configuration that these variables and the file in the state directory make.
    ///
    /// # Errors
    /// Which setting is missing or wrong, and where it stands.
    pub fn load(var: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let set = |name: &'static str| {
            var(name).filter(|value| !value.is_empty()).map(|value| (name.to_owned(), value))
        };
        let in_user_home = |variable, below: &str| {
            let home = set("HOME").ok_or(ConfigError::NoHome { variable })?.1;
            Ok(PathBuf::from(home).join(below))
        };
        let home = match set(HOME_VARIABLE) {
            Some((name, path)) => absolute(name, path.into())?,
            None => in_user_home(HOME_VARIABLE, ".matchlock")?,
        };
        let (file, said) = (FileConfig::read(&home)?, |key: &str| in_file(&home, key));
        let path = |variable, key: &str, in_file: Option<PathBuf>| {
            set(variable)
                .map(|(name, path)| (name, path.into()))
                .or(in_file.map(|path| (said(key), path)))
                .map(|(setting, path)| absolute(setting, path))
                .transpose()
        };
        let cache = match path(CACHE_VARIABLE, "cache", file.cache)? {
            Some(cache) => cache,
            None => in_user_home(CACHE_VARIABLE, ".cache/matchlock")?,
        };
        let boot_timeout = set(BOOT_TIMEOUT_VARIABLE)
            .or(file.boot_timeout.map(|seconds| (said("boot_timeout"), number(seconds))))
            .map(|(setting, value)| parsed(setting, value, SECONDS, |seconds: &u64| *seconds > 0))
            .transpose()?;
        let history_days = set(HISTORY_DAYS_VARIABLE)
            .map(|(setting, value)| parsed(setting, value, DAYS, |_: &u32| true))
            .transpose()?;
        let subnet_pool = set(SUBNET_POOL_VARIABLE)
            .or(file.subnet_pool.map(|pool| (said("subnet_pool"), pool.into())))
            .map(|(setting, pool)| {
                let parsed = pool.to_string_lossy().parse();
                parsed.map_err(|reason| ConfigError::SubnetPool { setting, reason })
            })
            .transpose()?;
        Ok(Self {
            subnet_pool: subnet_pool.unwrap_or_default(),
            kernel: path(matchlock_host::guest_bundle::KERNEL_VARIABLE, "kernel", file.kernel)?,
            boot_timeout: boot_timeout.map(Duration::from_secs),
            history_days: history_days.or(file.history_days).unwrap_or(DEFAULT_HISTORY_DAYS),
            home,
            cache,
        })
    }

    /// The directory of the VMs' directories.
    #[must_use]
    pub fn vms_dir(&self) -> PathBuf {
        self.home.join("vms")
    }
}

impl FileConfig {
    /// The file in this state directory; all defaults when there is none.
    fn read(home: &Path) -> Result<Self, ConfigError> {
        let path = home.join(CONFIG_FILE);
        let text = match read_trusted(&path) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Self::default()),
            Err(source) => return Err(ConfigError::Unreadable { path, source }),
        };
        toml::from_str(&text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            ConfigError::File { path, line, message: error.message().replace('\n', " ") }
        })
    }
}

/// The longest file that is no mistake.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The bits of a mode that let others write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The text of a file that only its user can have written; `None` if there is none.
fn read_trusted(path: &Path) -> io::Result<Option<String>> {
    // Not followed into waiting for somebody to write, should it be a FIFO.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        // A link to nothing is a mistake, not nothing. (A home that is no directory is told later.)
        Err(Errno::NOENT | Errno::NOTDIR) if path.symlink_metadata().is_err() => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let found = file.metadata()?;
    let us = rustix::process::geteuid().as_raw();
    if !found.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if ![0, us].contains(&found.uid()) || found.mode() & WRITABLE_BY_OTHERS != 0 {
        return Err(io::Error::other("others can write it: `chmod 600` it, as its owner"));
    }
    if found.len() > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// How a setting in the file is named in an error.
fn in_file(home: &Path, key: &str) -> String {
    format!("{key} in {}", home.join(CONFIG_FILE).display())
}

fn number(number: u64) -> OsString {
    number.to_string().into()
}

fn absolute(setting: String, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    Err(ConfigError::Relative { setting, path })
}

fn parsed<T: std::str::FromStr>(
    setting: String,
    value: OsString,
    unit: &'static str,
    makes_sense: impl Fn(&T) -> bool,
) -> Result<T, ConfigError> {
    let parsed = value.to_str().and_then(|text| text.parse().ok()).filter(makes_sense);
    parsed.ok_or(ConfigError::Number { setting, value, unit })
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn config(vars: &[(&str, &str)]) -> Result<NodeConfig, ConfigError> {
        let vars: Vec<_> = vars.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        NodeConfig::load(&move |name| vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.into()))
    }

    #[test]
    fn home_says_where_things_are_unless_told_otherwise() {
        let plain = config(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.home, PathBuf::from("/h/.matchlock"));
        assert_eq!(plain.cache, PathBuf::from("/h/.cache/matchlock"));
        assert_eq!((plain.boot_timeout, plain.history_days), (None, 30));
        let told = config(&[("MATCHLOCK_HOME", "/s"), ("MATCHLOCK_CACHE", "/c")]).unwrap();
        assert_eq!((told.home, told.cache), ("/s".into(), "/c".into()));
    }

    #[test]
    fn the_file_says_more_and_the_environment_has_the_last_word() {
        let home = tempfile::tempdir().unwrap();
        let text = "cache = '/c'\nkernel = '/k'\nboot_timeout = 7\nhistory_days = 3\n\
                    subnet_pool = 'base=10.9.0.0/16,size=30'\n";
        std::fs::write(home.path().join(CONFIG_FILE), text).unwrap();
        let home = home.path().to_str().unwrap();
        let told = config(&[("MATCHLOCK_HOME", home)]).unwrap();
        assert_eq!((told.cache, told.kernel), ("/c".into(), Some("/k".into())));
        assert_eq!((told.boot_timeout, told.history_days), (Some(Duration::from_secs(7)), 3));
        assert_eq!(told.subnet_pool, "base=10.9.0.0/16,size=30".parse().unwrap());
        let overruled = config(&[
            ("MATCHLOCK_HOME", home),
            ("MATCHLOCK_CACHE", "/d"),
            ("MATCHLOCK_KERNEL", "/l"),
            ("MATCHLOCK_BOOT_TIMEOUT", "8"),
            ("MATCHLOCK_HISTORY_DAYS", "0"),
            ("MATCHLOCK_SUBNET_POOL", "base=10.8.0.0/16,size=29"),
        ])
        .unwrap();
        assert_eq!((overruled.cache, overruled.kernel), ("/d".into(), Some("/l".into())));
        let eight = Some(Duration::from_secs(8));
        assert_eq!((overruled.boot_timeout, overruled.history_days), (eight, 0));
        assert_eq!(overruled.subnet_pool, "base=10.8.0.0/16,size=29".parse().unwrap());
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        assert!(matches!(config(&[]), Err(ConfigError::NoHome { .. })));
        for (name, value) in [
            ("MATCHLOCK_HOME", "x"),
            ("MATCHLOCK_CACHE", "x"),
            ("MATCHLOCK_BOOT_TIMEOUT", "0"),
            ("MATCHLOCK_BOOT_TIMEOUT", "1.5"),
            ("MATCHLOCK_HISTORY_DAYS", "-1"),
            ("MATCHLOCK_HISTORY_DAYS", "month"),
            ("MATCHLOCK_SUBNET_POOL", "10.0.0.0/8"),
            ("MATCHLOCK_SUBNET_POOL", "base=10.0.0.0/8,size=31"),
        ] {
            let text = config(&[("HOME", "/h"), (name, value)]).unwrap_err().to_string();
            let value = value.rsplit('=').next().unwrap();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_in_the_file_is_told_with_its_place() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(CONFIG_FILE);
        for (text, wanted) in [
            ("# days\nhistroy_days = 3\n", "config.toml, line 2: unknown field `histroy_days`"),
            ("history_days = 'x'", "line 1"),
            ("history_days = -3", "line 1"),
            ("boot_timeout = 0", "boot_timeout in "),
            ("cache = 'relative'", "cache in "),
            ("subnet_pool = 'base=10.0.0.0/8'", "subnet_pool in "),
            ("a b", "line 1"),
        ] {
            std::fs::write(&file, text).unwrap();
            let vars = [("HOME", "/h"), ("MATCHLOCK_HOME", home.path().to_str().unwrap())];
            let told = config(&vars).unwrap_err().to_string();
            assert!(told.contains(wanted) && !told.contains('\n'), "{text:?}: {told}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_trusted_is_refused_and_nothing_is_waited_for() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(CONFIG_FILE);
        let vars = [("HOME", "/h"), ("MATCHLOCK_HOME", home.path().to_str().unwrap())];
        type Make = fn(&Path);
        let cases: [(&str, Make); 6] = [
            ("not a regular file", |path| std::fs::create_dir(path).unwrap()),
            ("not a regular file", |path| {
                rustix::fs::mkfifoat(rustix::fs::CWD, path, Mode::RWXU).unwrap();
            }),
            ("not a regular file", |path| symlink("/dev/zero", path).unwrap()),
            ("No such file", |path| symlink("/nowhere", path).unwrap()),
            ("valid UTF-8", |path| std::fs::write(path, b"kernel = '\xff'").unwrap()),
            ("others can write", |path| {
                std::fs::write(path, "").unwrap();
                std::fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
            }),
        ];
        for (wanted, make) in cases {
            make(&file);
            let refused = config(&vars).unwrap_err();
            let told = matchlock_model::failure::chain(&refused);
            assert!(told.contains(wanted) && told.contains("config.toml"), "{told}");
            if file.is_dir() && !file.is_symlink() {
                std::fs::remove_dir(&file).unwrap();
            } else {
                std::fs::remove_file(&file).unwrap();
            }
        }
    }
}
