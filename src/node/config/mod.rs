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

use matchlock_host::image::ImportLimits;
use matchlock_host::registry::RegistrySettings;
use matchlock_host::vm_log::LogLimits;
use matchlock_model::subnet::{InvalidPool, SubnetPool};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Deserializer};

mod images;
pub mod registries;

/// The environment variable of the state directory.
pub const HOME_VARIABLE: &str = "MATCHLOCK_HOME";
/// The environment variable of the cache directory.
pub const CACHE_VARIABLE: &str = "MATCHLOCK_CACHE";
/// The environment variable of the time that a guest has to get ready, in seconds.
pub const BOOT_TIMEOUT_VARIABLE: &str = "MATCHLOCK_BOOT_TIMEOUT";
/// Names the environment variable of `hang_timeout`.
pub const HANG_TIMEOUT_VARIABLE: &str = "MATCHLOCK_HANG_TIMEOUT";
/// The environment variable of the time that removed VMs are remembered, in days.
pub const HISTORY_DAYS_VARIABLE: &str = "MATCHLOCK_HISTORY_DAYS";
/// The environment variable of the pool that subnets are taken from.
pub const SUBNET_POOL_VARIABLE: &str = "MATCHLOCK_SUBNET_POOL";
/// Names the environment variable of `vm_log_size_mb`.
pub const VM_LOG_SIZE_VARIABLE: &str = "MATCHLOCK_VM_LOG_SIZE_MB";
/// Names the environment variable of `vm_log_files`.
pub const VM_LOG_FILES_VARIABLE: &str = "MATCHLOCK_VM_LOG_FILES";
/// Names the environment variable of `auto_warm`.
pub const AUTO_WARM_VARIABLE: &str = "MATCHLOCK_AUTO_WARM";
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
    /// How long a guest may not answer before that is recorded; `None` means the default.
    pub hang_timeout: Option<Duration>,
    /// How many days the history of a removed VM is kept.
    pub history_days: u32,
    /// Where subnets are taken from. What is wrong with it ends only what needs one.
    pub subnet_pool: Result<SubnetPool, BadPool>,
    /// How much of what a VM's command prints is kept.
    pub vm_log: LogLimits,
    /// Whether a VM that had no snapshot to start from has one made for the next.
    pub auto_warm: bool,
    /// How much an image may take.
    pub image_limits: ImportLimits,
    /// What is said of image registries.
    pub registries: RegistrySettings,
}

/// A subnet pool that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {reason}")]
pub struct BadPool {
    /// Which setting, and where it stands.
    setting: String,
    /// What is wrong with it.
    reason: InvalidPool,
}

/// The settings in the file, named as in it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FileConfig {
    #[serde(deserialize_with = "text")]
    cache: Option<PathBuf>,
    #[serde(deserialize_with = "text")]
    kernel: Option<PathBuf>,
    #[serde(deserialize_with = "number")]
    boot_timeout: Option<u64>,
    #[serde(deserialize_with = "number")]
    hang_timeout: Option<u64>,
    #[serde(deserialize_with = "number")]
    history_days: Option<u64>,
    #[serde(deserialize_with = "text")]
    subnet_pool: Option<String>,
    #[serde(deserialize_with = "number")]
    vm_log_size_mb: Option<u64>,
    #[serde(deserialize_with = "number")]
    vm_log_files: Option<u64>,
    #[serde(deserialize_with = "switch")]
    auto_warm: Option<bool>,
    image: images::Section,
    registry: registries::Section,
}

/// A whole number, refused in words for whoever wrote the file.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let value = toml::Value::deserialize(from)?;
    let number = value.as_integer().and_then(|number| u64::try_from(number).ok());
    number.map(Some).ok_or_else(|| wanted("a whole number, without quotes", &value))
}

/// A text in quotes, refused likewise.
fn text<'de, D: Deserializer<'de>, T: From<String>>(from: D) -> Result<Option<T>, D::Error> {
    match toml::Value::deserialize(from)? {
        toml::Value::String(text) => Ok(Some(text.into())),
        other => Err(wanted("a text in quotes", &other)),
    }
}

/// Yes or no, refused likewise.
fn switch<'de, D: Deserializer<'de>>(from: D) -> Result<Option<bool>, D::Error> {
    match toml::Value::deserialize(from)? {
        toml::Value::Boolean(is_on) => Ok(Some(is_on)),
        other => Err(wanted("true or false, without quotes", &other)),
    }
}

fn wanted<E: serde::de::Error>(what: &str, given: &toml::Value) -> E {
    let given = match given {
        toml::Value::Integer(number) => number.to_string(),
        other => format!("this {}", other.type_str()),
    };
    E::custom(format!("write {what}, not {given}"))
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
    /// A switch is neither on nor off.
    #[error("{setting} is {value:?}: use 1 or 0")]
    Switch {
        /// Which setting.
        setting: String,
        /// Its value.
        value: OsString,
    },
    /// A text names no host.
    #[error("{setting} is {value:?}: write HOST or HOST:PORT, without a scheme and a path")]
    Host {
        /// Which setting, and where it stands.
        setting: String,
        /// Its value.
        value: String,
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
/// What is counted in the size of a VM's log.
const MEGABYTES: &str = "MB, at least 1";
/// What is counted in the number of files of a VM's log.
const FILES: &str = "files, at most 100; 0 keeps no log";

/// Where a setting comes from: the environment, or the file in the state directory.
struct Sources<'a> {
    var: &'a dyn Fn(&str) -> Option<OsString>,
    home: &'a Path,
}

fn variable(
    var: &dyn Fn(&str) -> Option<OsString>,
    name: &'static str,
) -> Option<(String, OsString)> {
    var(name).filter(|value| !value.is_empty()).map(|value| (name.to_owned(), value))
}

impl Sources<'_> {
    /// The setting's value with the place where it stands.
    fn get(
        &self,
        name: &'static str,
        key: &str,
        in_file: Option<OsString>,
    ) -> Option<(String, OsString)> {
        let said = |value| (format!("{key} in {}", self.home.join(CONFIG_FILE).display()), value);
        variable(self.var, name).or(in_file.map(said))
    }

    fn path(
        &self,
        name: &'static str,
        key: &str,
        in_file: Option<PathBuf>,
    ) -> Result<Option<PathBuf>, ConfigError> {
        self.get(name, key, in_file.map(Into::into))
            .map(|(setting, path)| absolute(setting, path.into()))
            .transpose()
    }

    fn number<T: std::str::FromStr>(
        &self,
        name: &'static str,
        key: &str,
        in_file: Option<u64>,
        unit: &'static str,
        makes_sense: impl Fn(&T) -> bool,
    ) -> Result<Option<T>, ConfigError> {
        self.get(name, key, in_file.map(|number| number.to_string().into()))
            .map(|(setting, value)| parsed(setting, value, unit, makes_sense))
            .transpose()
    }

    fn seconds(
        &self,
        name: &'static str,
        key: &str,
        in_file: Option<u64>,
    ) -> Result<Option<Duration>, ConfigError> {
        let seconds = self.number(name, key, in_file, SECONDS, |seconds| *seconds > 0)?;
        Ok(seconds.map(Duration::from_secs))
    }

    fn switch(
        &self,
        name: &'static str,
        in_file: Option<bool>,
    ) -> Result<Option<bool>, ConfigError> {
        match variable(self.var, name) {
            None => Ok(in_file),
            Some((_, value)) if value == "1" => Ok(Some(true)),
            Some((_, value)) if value == "0" => Ok(Some(false)),
            Some((setting, value)) => Err(ConfigError::Switch { setting, value }),
        }
    }

    fn log_limits(&self, file: &FileConfig) -> Result<LogLimits, ConfigError> {
        let default = LogLimits::default();
        let size = self.number(
            VM_LOG_SIZE_VARIABLE,
            "vm_log_size_mb",
            file.vm_log_size_mb,
            MEGABYTES,
            |size| *size > 0,
        )?;
        let files = self.number(
            VM_LOG_FILES_VARIABLE,
            "vm_log_files",
            file.vm_log_files,
            FILES,
            |files| *files <= LogLimits::MOST_FILES,
        )?;
        Ok(LogLimits {
            file_bytes: size.map_or(default.file_bytes, |mb: u64| mb.saturating_mul(1 << 20)),
            files: files.unwrap_or(default.files),
        })
    }
}

impl NodeConfig {
    /// The configuration that these variables and the file in the state directory make.
    ///
    /// # Errors
    /// Which setting is missing or wrong, and where it stands.
    pub fn load(var: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let in_user_home = |needed, below: &str| {
            let home = variable(var, "HOME").ok_or(ConfigError::NoHome { variable: needed })?.1;
            Ok(PathBuf::from(home).join(below))
        };
        let home = match variable(var, HOME_VARIABLE) {
            Some((name, path)) => absolute(name, path.into())?,
            None => in_user_home(HOME_VARIABLE, ".matchlock")?,
        };
        let file = FileConfig::read(&home)?;
        let from = Sources { var, home: &home };
        let cache = match from.path(CACHE_VARIABLE, "cache", file.cache.clone())? {
            Some(cache) => cache,
            None => in_user_home(CACHE_VARIABLE, ".cache/matchlock")?,
        };
        let history_days =
            from.number(HISTORY_DAYS_VARIABLE, "history_days", file.history_days, DAYS, |_| true)?;
        let pool =
            from.get(SUBNET_POOL_VARIABLE, "subnet_pool", file.subnet_pool.clone().map(Into::into));
        let subnet_pool = match pool {
            None => Ok(SubnetPool::default()),
            Some((setting, pool)) => {
                let parsed = pool.to_string_lossy().parse();
                parsed.map_err(|reason| BadPool { setting, reason })
            }
        };
        Ok(Self {
            subnet_pool,
            auto_warm: from.switch(AUTO_WARM_VARIABLE, file.auto_warm)?.unwrap_or(true),
            vm_log: from.log_limits(&file)?,
            image_limits: images::limits(&from, &file.image)?,
            registries: registries::settings(&from, file.registry.clone())?,
            boot_timeout: from.seconds(BOOT_TIMEOUT_VARIABLE, "boot_timeout", file.boot_timeout)?,
            hang_timeout: from.seconds(HANG_TIMEOUT_VARIABLE, "hang_timeout", file.hang_timeout)?,
            history_days: history_days.unwrap_or(DEFAULT_HISTORY_DAYS),
            kernel: from.path(
                matchlock_host::guest_bundle::KERNEL_VARIABLE,
                "kernel",
                file.kernel,
            )?,
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
mod tests;
