//! The image's config: which machine it is for, its layers' diff ids, how to run it.
//!
//! `null`, `[]` and an absent key mean the same, as they do for Docker; so does `null` in place of a
//! text and an empty one. A variable without `=` is none. Everything else that is not
//! what it should be is refused: it comes from a stranger and ends in a command line.

use std::collections::BTreeMap;

use matchlock_model::image::ImageConfig;
use matchlock_model::platform::{Platform, host_architecture};
use matchlock_model::signal;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::ImageError;
use super::stream::plain;
use super::wish::Change;

/// What we need of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Each `sha256:` and 64 hex digits, lowest layer first.
    pub(super) diff_ids: Vec<String>,
    pub(super) config: ImageConfig,
}

impl Parsed {
    /// The name of the flattened content, 64 hex digits.
    pub(super) fn squashed(&self) -> String {
        let mut hash = Sha256::new();
        hash.update("matchlock-squash-v1\n");
        for id in &self.diff_ids {
            hash.update(id);
            hash.update("\n");
        }
        hex::encode(hash.finalize())
    }
}

#[derive(Deserialize)]
struct Document {
    architecture: Option<String>,
    os: Option<String>,
    config: Option<Run>,
    rootfs: Option<Rootfs>,
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Run {
    user: Option<String>,
    working_dir: Option<String>,
    entrypoint: Option<Vec<Text>>,
    cmd: Option<Vec<Text>>,
    env: Option<Vec<Text>>,
    labels: Option<BTreeMap<String, Text>>,
    stop_signal: Option<String>,
}

/// A text that may be `null`, which Docker reads as an empty one.
type Text = Option<String>;

fn texts(list: Option<Vec<Text>>) -> Vec<String> {
    list.unwrap_or_default().into_iter().map(Option::unwrap_or_default).collect()
}

fn damaged(what: impl Into<String>) -> ImageError {
    ImageError::Damaged { what: what.into() }
}

/// The error for an image of another platform.
pub(super) fn wrong_platform(image: String, wanted: &Platform) -> ImageError {
    let image = plain(&image);
    if *wanted == Platform::host() {
        return ImageError::Platform { image, host: wanted.to_string() };
    }
    ImageError::NoSuchPlatform { image, wanted: wanted.to_string() }
}

/// The hex digits of a digest that we can check.
pub(super) fn sha256_of(digest: &str) -> Result<&str, ImageError> {
    let hex = digest.strip_prefix("sha256:").filter(|hex| is_sha256(hex));
    hex.ok_or_else(|| {
        damaged(plain(&format!("{digest:?} is no sha256 digest, and no other is known here")))
    })
}

/// Whether these are 64 hex digits.
pub(super) fn is_sha256(hex: &str) -> bool {
    hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Reads a config; refuses one for another machine.
pub(super) fn parse(text: &[u8]) -> Result<Parsed, ImageError> {
    parse_for(text, &Platform::host())
}

/// Reads a config; refuses one that is not for this platform.
pub(super) fn parse_for(text: &[u8], wanted: &Platform) -> Result<Parsed, ImageError> {
    let document: Document = serde_json::from_slice(text)
        .map_err(|error| damaged(plain(&format!("the image's config: {error}"))))?;
    let os = document.os.filter(|os| !os.is_empty()).unwrap_or_else(|| "linux".into());
    let architecture = document.architecture.filter(|name| !name.is_empty());
    let architecture =
        architecture.ok_or_else(|| damaged("the image's config names no architecture"))?;
    if os != "linux" || architecture != wanted.architecture {
        return Err(wrong_platform(format!("{os}/{architecture}"), wanted));
    }
    let diff_ids = document.rootfs.and_then(|rootfs| rootfs.diff_ids).unwrap_or_default();
    for id in &diff_ids {
        sha256_of(id)?;
    }
    if diff_ids.is_empty() {
        return Err(damaged("the image has no layers"));
    }
    let run = document.config.unwrap_or_default();
    let config = ImageConfig {
        user: run.user.unwrap_or_default(),
        working_dir: run.working_dir.unwrap_or_default(),
        entrypoint: texts(run.entrypoint),
        cmd: texts(run.cmd),
        env: environment(texts(run.env))?,
        labels: (run.labels.into_iter().flatten())
            .map(|(name, value)| (name, value.unwrap_or_default()))
            .collect(),
        stop_signal: run.stop_signal.unwrap_or_default(),
        platform: if architecture == host_architecture() {
            String::new()
        } else {
            wanted.to_string()
        },
    };
    if !config.stop_signal.is_empty() && signal::number(&config.stop_signal).is_none() {
        let text = format!("the StopSignal {:?} of the image's config is none", config.stop_signal);
        return Err(damaged(plain(&text)));
    }
    let singles = [&config.user, &config.working_dir];
    if singles.into_iter().chain(&config.entrypoint).chain(&config.cmd).any(|t| t.contains('\0')) {
        return Err(damaged("the image's config holds a NUL character"));
    }
    Ok(Parsed { diff_ids, config })
}

/// The config of a root filesystem that came without one: the same layer and the same changes give
/// the same text.
pub(super) fn of_rootfs(layer: &str, changes: &[Change]) -> Vec<u8> {
    let mut config = ImageConfig::default();
    for change in changes {
        change.apply(&mut config);
    }
    let env: Vec<String> =
        config.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let document = serde_json::json!({
        "architecture": host_architecture(),
        "os": "linux",
        "config": {
            "User": config.user,
            "WorkingDir": config.working_dir,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "Env": env,
            "Labels": config.labels,
            "StopSignal": config.stop_signal,
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
    });
    document.to_string().into_bytes()
}

fn environment(list: Vec<String>) -> Result<BTreeMap<String, String>, ImageError> {
    let mut map = BTreeMap::new();
    for entry in list {
        let Some((key, value)) = entry.split_once('=') else {
            // A name alone takes a variable away, for Docker.
            map.remove(&entry);
            continue;
        };
        if key.is_empty() || entry.contains('\0') {
            // Values may be secrets of whoever built the image: not shown.
            return Err(damaged("an Env entry of the image's config is not NAME=VALUE"));
        }
        map.insert(key.to_owned(), value.to_owned());
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(rest: &str) -> String {
        let arch = host_architecture();
        format!(r#"{{"architecture":"{arch}","os":"linux"{rest}}}"#)
    }

    fn with_layer(config: &str) -> Result<Parsed, ImageError> {
        let id = "0".repeat(64);
        let rest = format!(r#","rootfs":{{"diff_ids":["sha256:{id}"]}},"config":{config}"#);
        parse(document(&rest).as_bytes())
    }

    #[test]
    fn a_config_is_read() {
        let parsed = with_layer(
            r#"{"User":"1000:1000","WorkingDir":"/srv","Entrypoint":["/bin/e"],"Cmd":["a","b c"],
                "Env":["PATH=/bin","EMPTY=","A=b=c","A=d"],"Labels":{"x":"1"},"StopSignal":"SIGQUIT"}"#,
        );
        let config = parsed.unwrap().config;
        assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("1000:1000", "/srv"));
        assert_eq!((config.entrypoint, config.cmd.len()), (vec!["/bin/e".to_owned()], 2));
        assert_eq!((config.stop_signal.as_str(), config.labels["x"].as_str()), ("SIGQUIT", "1"));
        let env: Vec<_> = config.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(env, [("A", "d"), ("EMPTY", ""), ("PATH", "/bin")]);
    }

    #[test]
    fn null_is_nothing() {
        let nulls = r#"{"User":null,"WorkingDir":null,"Entrypoint":null,"Cmd":null,"Env":null}"#;
        assert_eq!(with_layer(nulls).unwrap().config, ImageConfig::default());
        assert_eq!(with_layer("null").unwrap().config, ImageConfig::default());
        let inside =
            r#"{"Env":["A=1","B=2","A",null,"ALONE"],"Labels":{"a":null},"Cmd":["x",null]}"#;
        let config = with_layer(inside).unwrap().config;
        assert_eq!(config.env, [("B".to_owned(), "2".to_owned())].into());
        assert_eq!(
            (config.labels["a"].as_str(), config.cmd),
            ("", vec!["x".into(), String::new()])
        );
    }

    #[test]
    fn what_makes_no_sense_is_damaged() {
        for config in [
            r#"{"Env":["=x"]}"#,
            r#"{"Env":["A=\u0000"]}"#,
            r#"{"Env":"A=b"}"#,
            r#"{"Cmd":"sh"}"#,
            r#"{"Cmd":["a\u0000b"]}"#,
            r#"{"User":1000}"#,
            r#"{"StopSignal":"SIGNONE"}"#,
            r#"{"Labels":["a"]}"#,
            "7",
        ] {
            assert!(matches!(with_layer(config), Err(ImageError::Damaged { .. })), "{config}");
        }
        for rest in ["", r#","rootfs":{}"#, r#","rootfs":{"diff_ids":["md5:00"]}"#] {
            let parsed = parse(document(rest).as_bytes());
            assert!(matches!(parsed, Err(ImageError::Damaged { .. })), "{rest}");
        }
    }

    #[test]
    fn another_platform_is_named() {
        for text in [
            r#"{"architecture":"s390x","os":"linux"}"#,
            r#"{"architecture":"amd64","os":"windows"}"#,
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, ImageError::Platform { .. }), "{error}");
        }
        assert!(matches!(parse(b"{}"), Err(ImageError::Damaged { .. })));
    }

    #[test]
    fn the_squashed_name_is_the_references() {
        let ids = vec![format!("sha256:{}", "a".repeat(64)), format!("sha256:{}", "b".repeat(64))];
        let text = format!("matchlock-squash-v1\n{}\n{}\n", ids[0], ids[1]);
        let parsed = Parsed { diff_ids: ids, config: ImageConfig::default() };
        assert_eq!(parsed.squashed(), hex::encode(Sha256::digest(text)));
    }
}
