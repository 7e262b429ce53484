//! The answer to a registry's 401: which credentials it wants, and the token that its realm gives.

use http_auth::parse_challenges;
use reqwest::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use super::credentials::Credentials;
use super::error::RegistryError;
use super::words;

/// The longest answer of a realm.
const MAX_TOKEN: u64 = 1024 * 1024;
/// Who we are to a realm.
const CLIENT_ID: &str = "matchlock";

/// What a registry wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A name and a password.
    Basic,
    /// A token of this realm.
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// What a refused answer asks for; `None` if it is nothing that we know.
pub(super) fn challenge(answer: &Response) -> Option<Challenge> {
    let headers = answer.headers().get_all(WWW_AUTHENTICATE);
    parsed(headers.iter().filter_map(|header| header.to_str().ok()))
}

fn parsed<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        for given in parse_challenges(header).unwrap_or_default() {
            let parameter = |name: &str| {
                let found = given.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if given.scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = parameter("realm") {
                    let (service, scope) = (parameter("service"), parameter("scope"));
                    return Some(Challenge::Bearer { realm, service, scope });
                }
            } else if given.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Who asks whom for access to what.
pub(super) struct Access<'a> {
    pub(super) client: &'a Client,
    /// The registry, as the user knows it.
    pub(super) registry: &'a str,
    pub(super) image: &'a str,
    pub(super) repository: &'a str,
    /// Whether the registry itself is asked by https: then its realm is, too.
    pub(super) https: bool,
    pub(super) login: Option<&'a Credentials>,
}

impl Access<'_> {
    fn denied(&self, said: impl Into<String>) -> RegistryError {
        RegistryError::Denied {
            image: self.image.to_owned(),
            registry: self.registry.to_owned(),
            said: said.into(),
        }
    }

    /// The header that answers a challenge.
    ///
    /// # Errors
    /// When there is no answer, or the realm gives none.
    pub(super) async fn header(&self, challenge: &Challenge) -> Result<HeaderValue, RegistryError> {
        match challenge {
            Challenge::Basic => match self.login {
                None => Err(self.denied("it wants a name and a password")),
                Some(Credentials::IdentityToken(_)) => {
                    Err(self.denied("it wants a name and a password, and the login has a token"))
                }
                Some(Credentials::Password { user, password }) => {
                    let request = self.client.get("http://localhost/");
                    let request = request.basic_auth(user, Some(password)).build();
                    let header = request.ok().and_then(|r| r.headers().get(AUTHORIZATION).cloned());
                    header.ok_or_else(|| self.denied("the login cannot be sent in a header"))
                }
            },
            Challenge::Bearer { realm, service, scope } => {
                let token = self.token(realm, service.as_deref(), scope.as_deref()).await?;
                let mut header = HeaderValue::try_from(format!("Bearer {token}"))
                    .map_err(|_| self.denied("its token cannot be sent in a header"))?;
                header.set_sensitive(true);
                Ok(header)
            }
        }
    }

    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, RegistryError> {
        let url =
            Url::parse(realm).map_err(|_| self.denied("the realm that it names is no URL"))?;
        let Some(host) = url.host_str().filter(|_| matches!(url.scheme(), "https" | "http")) else {
            return Err(self.denied("the realm that it names is no web address"));
        };
        let host = words::line(host);
        if self.https && url.scheme() != "https" {
            return Err(RegistryError::Downgrade { host: self.registry.to_owned() });
        }
        let pull = format!("repository:{}:pull", self.repository);
        let scope = scope.unwrap_or(&pull);
        let request = self.request(url, service, scope);
        let what = "a token";
        let sent = request.send().await.map_err(|e| RegistryError::of(e, &host, what))?;
        let status = sent.status();
        let body = super::client::capped(sent, MAX_TOKEN, &host, what).await?;
        match status {
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST
            | StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND => return Err(self.denied(words::error(&body).1)),
            _ => return Err(super::client::refused(status, None, &body, &host, what)),
        }
        let not_one = || RegistryError::NotARegistry {
            host: host.clone(),
            what: if words::is_markup(&body) { "a page of HTML" } else { "no token" }.to_owned(),
        };
        let token: Token = serde_json::from_slice(&body).map_err(|_| not_one())?;
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        given(token.token).or_else(|| given(token.access_token)).ok_or_else(not_one)
    }

    fn request(&self, realm: Url, service: Option<&str>, scope: &str) -> RequestBuilder {
        let mut fields = vec![("scope", scope)];
        fields.extend(service.map(|service| ("service", service)));
        match self.login {
            Some(Credentials::IdentityToken(token)) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", CLIENT_ID),
                    ("refresh_token", token),
                ]);
                self.client.post(realm).form(&fields)
            }
            Some(Credentials::Password { user, password }) => {
                fields.push(("account", user));
                self.client.get(realm).query(&fields).basic_auth(user, Some(password))
            }
            None => self.client.get(realm).query(&fields),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_preferred_to_a_password() {
        let bearer = r#"Bearer realm="https://a/t",service="s x",scope="repository:l/a:pull""#;
        let expected = Some(Challenge::Bearer {
            realm: "https://a/t".into(),
            service: Some("s x".into()),
            scope: Some("repository:l/a:pull".into()),
        });
        assert_eq!(parsed([bearer].into_iter()), expected);
        assert_eq!(parsed(["Basic realm=\"x\"", bearer].into_iter()), expected);
        assert_eq!(parsed(["basic realm=\"x\""].into_iter()), Some(Challenge::Basic));
        for odd in ["Bearer service=\"s\"", "Negotiate", "", "\"", "Bearer realm="] {
            assert_eq!(parsed([odd].into_iter()), None, "{odd}");
        }
    }
}
