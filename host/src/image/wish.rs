//! What an import is asked for besides its archive: which image of it, under which name, and how a
//! plain root filesystem is to be run.
//!
//! Nothing here reads an archive; what makes no sense is refused before one is looked at.

use std::str::FromStr;

use matchlock_model::image::ImageConfig;
use matchlock_model::platform::Platform;
use matchlock_model::signal;

/// What is wanted of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImportWish {
    /// The tag that the image gets; without one, each image of the archive gets its own names.
    pub tag: Option<String>,
    /// Which of the platforms of an index; this host's without one.
    pub platform: Option<Platform>,
    /// How a plain root filesystem is to be run, as `docker import --change` is told.
    pub changes: Vec<Change>,
}

impl ImportWish {
    /// One image of this host's platform, under this tag.
    #[must_use]
    pub fn of(tag: &str) -> Self {
        Self { tag: Some(tag.to_owned()), ..Self::default() }
    }
}

/// A wish that has no form of one; what is wrong, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidWish(String);

/// A line of a Dockerfile that says how an image is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change(Setting);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Setting {
    Cmd(Vec<String>),
    Entrypoint(Vec<String>),
    Env(Vec<(String, String)>),
    Label(Vec<(String, String)>),
    StopSignal(String),
    User(String),
    WorkingDir(String),
}

impl FromStr for Change {
    type Err = InvalidWish;

    fn from_str(text: &str) -> Result<Self, InvalidWish> {
        let refused = |what: &str| Err(InvalidWish(format!("{text:?}: {what}")));
        let (word, rest) = text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
        let rest = rest.trim();
        if rest.is_empty() || rest.contains('\0') {
            return refused("a change is an instruction and what it sets, such as 'CMD [\"sh\"]'");
        }
        let pairs = || {
            pairs(rest).ok_or_else(|| {
                let word = word.to_uppercase();
                InvalidWish(format!(
                    "{text:?}: use {word} NAME=VALUE, once or more; a value with spaces in quotes"
                ))
            })
        };
        Ok(Self(match word.to_ascii_uppercase().as_str() {
            "CMD" => Setting::Cmd(words(rest)),
            "ENTRYPOINT" => Setting::Entrypoint(words(rest)),
            "ENV" => Setting::Env(pairs()?),
            "LABEL" => Setting::Label(pairs()?),
            "STOPSIGNAL" if signal::number(rest).is_none() => {
                return refused("there is no such signal");
            }
            "STOPSIGNAL" => Setting::StopSignal(rest.into()),
            "USER" => Setting::User(rest.into()),
            "WORKDIR" if !rest.starts_with('/') => return refused("use an absolute path"),
            "WORKDIR" => Setting::WorkingDir(rest.into()),
            _ => {
                return refused(
                    "only CMD, ENTRYPOINT, ENV, LABEL, STOPSIGNAL, USER and WORKDIR can be set",
                );
            }
        }))
    }
}

impl Change {
    /// Sets in a config what it says.
    pub(super) fn apply(&self, config: &mut ImageConfig) {
        match self.0.clone() {
            Setting::Cmd(words) => config.cmd = words,
            Setting::Entrypoint(words) => config.entrypoint = words,
            Setting::Env(pairs) => config.env.extend(pairs),
            Setting::Label(pairs) => config.labels.extend(pairs),
            Setting::StopSignal(name) => config.stop_signal = name,
            Setting::User(user) => config.user = user,
            Setting::WorkingDir(path) => config.working_dir = path,
        }
    }
}

/// Names and values as a Dockerfile writes them: words, quoted as for a shell.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let words = shlex::split(text)?;
    let pair = |word: String| {
        let (name, value) = word.split_once('=').filter(|(name, _)| !name.is_empty())?;
        Some((name.to_owned(), value.to_owned()))
    };
    words.into_iter().map(pair).collect()
}

/// A command as a Dockerfile writes it: a JSON list, or a line for the shell.
fn words(text: &str) -> Vec<String> {
    serde_json::from_str(text)
        .unwrap_or_else(|_| vec!["/bin/sh".to_owned(), "-c".to_owned(), text.to_owned()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_set_how_an_image_is_run() {
        let mut config = ImageConfig::default();
        for text in [
            "CMD [\"a\", \"b c\"]",
            "entrypoint exec top -b",
            "ENV A=b=c",
            "ENV Q=\"two words\"",
            "ENV B=1 C='2 3' D=4\\ 5 E=",
            "LABEL one=1 two=2",
            "STOPSIGNAL SIGQUIT",
            "USER 7:8",
            "WORKDIR /srv/a b",
        ] {
            text.parse::<Change>().unwrap().apply(&mut config);
        }
        assert_eq!(config.cmd, ["a", "b c"]);
        assert_eq!(config.entrypoint, ["/bin/sh", "-c", "exec top -b"]);
        assert_eq!((config.env["A"].as_str(), config.env["Q"].as_str()), ("b=c", "two words"));
        let env = ["B", "C", "D", "E"].map(|name| config.env[name].as_str());
        assert_eq!((env, config.labels["two"].as_str()), (["1", "2 3", "4 5", ""], "2"));
        assert_eq!((config.labels["one"].as_str(), config.stop_signal.as_str()), ("1", "SIGQUIT"));
        assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("7:8", "/srv/a b"));
        for bad in [
            "",
            "CMD",
            "ENV A",
            "ENV =x",
            "ENV A=b c",
            "ENV A='b",
            "RUN ls",
            "STOPSIGNAL SIGNO",
            "WORKDIR rel",
        ] {
            assert!(bad.parse::<Change>().is_err(), "{bad}");
        }
    }
}
