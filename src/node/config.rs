//! Where things are, from the environment. No side effects.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The environment variable of the state directory.
pub const HOME_VARIABLE: &str = "MATCHLOCK_HOME";
/// The environment variable of the cache directory.
pub const CACHE_VARIABLE: &str = "MATCHLOCK_CACHE";
/// The environment variable of the time that a guest has to get ready, in seconds.
pub const BOOT_TIMEOUT_VARIABLE: &str = "MATCHLOCK_BOOT_TIMEOUT";

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
}

/// Why there is no configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nothing says where to keep state.
    #[error("{variable} is not set and neither is HOME: set {variable} to a directory of yours")]
    NoHome {
        /// The variable that could say it.
        variable: &'static str,
    },
    /// A path is relative: it would mean another directory in each process.
    #[error("{variable} is {path:?}: use an absolute path")]
    Relative {
        /// The variable.
        variable: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// A number is none.
    #[error("{variable} is {value:?}: use a number of seconds, at least 1")]
    Number {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: OsString,
    },
}

impl NodeConfig {
    /// The configuration that these variables make.
    ///
    /// # Errors
    /// Which variable is missing or wrong.
    pub fn from_env(var: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let dir = |variable: &'static str, below_home: &str| match set(variable) {
            Some(path) => absolute(variable, path.into()),
            None => set("HOME")
                .map(|home| PathBuf::from(home).join(below_home))
                .ok_or(ConfigError::NoHome { variable }),
        };
        let kernel = set(matchlock_host::guest_bundle::KERNEL_VARIABLE)
            .map(|path| absolute(matchlock_host::guest_bundle::KERNEL_VARIABLE, path.into()))
            .transpose()?;
        let boot_timeout = set(BOOT_TIMEOUT_VARIABLE)
            .map(|value| match value.to_str().and_then(|text| text.parse::<u64>().ok()) {
                Some(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
                _ => Err(ConfigError::Number { variable: BOOT_TIMEOUT_VARIABLE, value }),
            })
            .transpose()?;
        Ok(Self {
            home: dir(HOME_VARIABLE, ".matchlock")?,
            cache: dir(CACHE_VARIABLE, ".cache/matchlock")?,
            kernel,
            boot_timeout,
        })
    }

    /// The directory of the VMs' directories.
    #[must_use]
    pub fn vms_dir(&self) -> PathBuf {
        self.home.join("vms")
    }
}

fn absolute(variable: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    Err(ConfigError::Relative { variable, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vars: &[(&str, &str)]) -> Result<NodeConfig, ConfigError> {
        let vars: Vec<_> = vars.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        NodeConfig::from_env(&move |name| {
            vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.into())
        })
    }

    #[test]
    fn home_says_where_things_are_unless_told_otherwise() {
        let plain = config(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.home, PathBuf::from("/h/.matchlock"));
        assert_eq!(plain.cache, PathBuf::from("/h/.cache/matchlock"));
        let told = config(&[("MATCHLOCK_HOME", "/s"), ("MATCHLOCK_CACHE", "/c")]).unwrap();
        assert_eq!((told.home, told.cache), ("/s".into(), "/c".into()));
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        assert!(matches!(config(&[]), Err(ConfigError::NoHome { .. })));
        let relative = config(&[("HOME", "/h"), ("MATCHLOCK_HOME", "x")]);
        assert!(matches!(relative, Err(ConfigError::Relative { .. })));
        let number = config(&[("HOME", "/h"), ("MATCHLOCK_BOOT_TIMEOUT", "0")]);
        assert!(matches!(number, Err(ConfigError::Number { .. })));
    }
}
