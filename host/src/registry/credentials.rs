//! The logins that `docker login` keeps: `config.json`, and the helpers that it names.
//!
//! # Invariants
//! 1. Looks only; nothing is written, and nothing of it is shown or logged.
//! 2. A helper is given the registry's name and has a deadline; it ends with whoever waits for it.
//! 3. No file is no login. A file that is there and cannot be read is an error, not "no login".

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::words::line;
use super::{HUB, HUB_KEY, RegistryError};

const MAX_FILE: u64 = 4 * 1024 * 1024;
/// A helper may ask a person.
const HELPER_LIMIT: Duration = Duration::from_secs(60);
/// The name that a helper gives an identity token.
const TOKEN_USER: &str = "<token>";
/// How helpers say that they know no login.
const NOT_FOUND: &str = "credentials not found";

/// A login.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    /// A name and its password.
    Password { user: String, password: String },
    /// What the realm takes instead of them.
    IdentityToken(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct File {
    auths: BTreeMap<String, Auth>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The login for a registry; `None` if there is none.
///
/// # Errors
/// [`RegistryError::Credentials`], when the file or a helper cannot be used.
pub(super) async fn find(dir: &Path, registry: &str) -> Result<Option<Credentials>, RegistryError> {
    let path = dir.join("config.json");
    let failed = |why: String| RegistryError::Credentials { registry: registry.to_owned(), why };
    let text = match read(&path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|error| failed(format!("{}: {error}", path.display())))?,
    };
    // The parser's words may hold a piece of a secret.
    let file: File = serde_json::from_slice(&text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        failed(format!("{}, line {line}, column {column}: not what Docker writes", path.display()))
    })?;
    let server = if registry == HUB { HUB_KEY } else { registry };
    let helper = file.helpers.iter().find(|(key, _)| is_for(key, registry)).map(|(_, name)| name);
    if let Some(name) = helper.or(file.store.as_ref()).filter(|name| !name.is_empty())
        && let Some(found) = ask(name, server).await.map_err(&failed)?
    {
        return Ok(Some(found));
    }
    let auth = file.auths.iter().find(|(key, _)| is_for(key, registry)).map(|(_, auth)| auth);
    auth.map_or(Ok(None), |auth| {
        login(auth)
            .map_err(|why| failed(format!("{}: the entry for {registry} {why}", path.display())))
    })
}

async fn read(path: &Path) -> io::Result<Vec<u8>> {
    let size = tokio::fs::metadata(path).await?.len();
    if size > MAX_FILE {
        return Err(io::Error::other(format!("it is longer than {MAX_FILE} bytes")));
    }
    tokio::fs::read(path).await
}

/// Whether a key of the file means this registry: keys may have a scheme and a path.
fn is_for(key: &str, registry: &str) -> bool {
    let host = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let host = host.unwrap_or(key).split('/').next().unwrap_or_default();
    host == registry || (registry == HUB && host == "index.docker.io")
}

fn login(auth: &Auth) -> Result<Option<Credentials>, &'static str> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if let Some(token) = given(&auth.identitytoken) {
        return Ok(Some(Credentials::IdentityToken(token)));
    }
    if let Some(encoded) = given(&auth.auth) {
        let config =
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let engine = GeneralPurpose::new(&base64::alphabet::STANDARD, config);
        let decoded = engine.decode(encoded.trim()).ok();
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let decoded = decoded.ok_or("is not base64 of a name and a password")?;
        let (user, password) = decoded.split_once(':').ok_or("holds no password")?;
        let password = password.trim_end_matches('\0').to_owned();
        return Ok(Some(Credentials::Password { user: user.to_owned(), password }));
    }
    let both = given(&auth.username).zip(given(&auth.password));
    Ok(both.map(|(user, password)| Credentials::Password { user, password }))
}

/// Asks a helper.
async fn ask(name: &str, server: &str) -> Result<Option<Credentials>, String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !name.bytes().all(good) {
        return Err(format!("{name:?} is not the name of a credential helper"));
    }
    let program = format!("docker-credential-{name}");
    let mut command = Command::new(&program);
    command.arg("get").kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let talk = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(format!("{server}\n").as_bytes()).await {
                // It may know the answer without the question.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(HELPER_LIMIT, talk).await {
        Err(_) => return Err(format!("{program} did not answer in {} s", HELPER_LIMIT.as_secs())),
        Ok(output) => output.map_err(|error| format!("could not run {program}: {error}"))?,
    };
    if !output.status.success() {
        let said = line(&String::from_utf8_lossy(&output.stdout));
        if said.contains(NOT_FOUND) {
            return Ok(None);
        }
        return Err(format!("{program} failed ({}): {said}", output.status));
    }
    // Not in the words of the parser: it may show what it has read.
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{program} did not answer as a credential helper does"))?;
    Ok(match answer {
        Answer { username, secret } if username == TOKEN_USER => {
            Some(Credentials::IdentityToken(secret))
        }
        Answer { username, .. } if username.is_empty() => None,
        Answer { username, secret } => {
            Some(Credentials::Password { user: username, password: secret })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn found(config: &str, registry: &str) -> Result<Option<Credentials>, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        find(dir.path(), registry).await.map_err(|error| error.to_string())
    }

    fn password(user: &str, password: &str) -> Result<Option<Credentials>, String> {
        Ok(Some(Credentials::Password { user: user.into(), password: password.into() }))
    }

    #[tokio::test]
    async fn logins_are_found_under_all_spellings() {
        for key in ["h.io:5", "https://h.io:5", "http://h.io:5/v2/", "h.io:5/"] {
            let config = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpw"}}}}}}"#);
            assert_eq!(found(&config, "h.io:5").await, password("u", "p"), "{key}");
            assert_eq!(found(&config, "h.io").await, Ok(None));
        }
        let hub = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="}}}"#;
        assert_eq!(found(hub, "docker.io").await, password("u", "p:q"));
        let plain = r#"{"auths":{"h":{"username":"u","password":"p"}},"HttpHeaders":{}}"#;
        assert_eq!(found(plain, "h").await, password("u", "p"));
        let token = r#"{"auths":{"h":{"auth":"dTo=","identitytoken":"t"}}}"#;
        assert_eq!(found(token, "h").await, Ok(Some(Credentials::IdentityToken("t".into()))));
        assert_eq!(found(r#"{"auths":{"h":{}}}"#, "h").await, Ok(None));
    }

    #[tokio::test]
    async fn no_file_is_no_login_and_a_bad_one_an_error() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(find(empty.path(), "h").await.unwrap(), None);
        let bad = found(r#"{"auths":{"h":{"auth":5,"x":"secret"}}}"#, "h").await.unwrap_err();
        assert!(bad.contains("line 1") && !bad.contains("secret"), "{bad}");
        let bad = found(r#"{"auths":{"h":{"auth":"!!"}}}"#, "h").await.unwrap_err();
        assert!(bad.contains("the entry for h"), "{bad}");
        let bad = found(r#"{"credsStore":"../evil"}"#, "h").await.unwrap_err();
        assert!(bad.contains("not the name of a credential helper"), "{bad}");
        let bad = found(r#"{"credHelpers":{"h":"not-there"}}"#, "h").await.unwrap_err();
        assert!(bad.contains("could not run docker-credential-not-there"), "{bad}");
    }

    #[test]
    fn a_login_is_not_shown() {
        let login = Credentials::IdentityToken("secret".into());
        assert!(!format!("{login:?}").contains("secret"));
    }
}
