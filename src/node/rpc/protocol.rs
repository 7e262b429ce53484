//! Requests, responses and notifications, as one line of JSON each (JSON-RPC 2.0).

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use matchlock_model::failure::Failure;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// The longest id that is a string, in bytes.
const MAX_ID_BYTES: usize = 256;

/// What a request is answered under. A number or a string, as the caller chose.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Id {
    /// A whole number, not negative.
    Number(u64),
    /// A text.
    Text(String),
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

impl Id {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => number.as_u64().map(Self::Number),
            Value::String(text) if text.len() <= MAX_ID_BYTES => Some(Self::Text(text.clone())),
            _ => None,
        }
    }
}

/// What kind of error; the number is what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// The line is no JSON.
    Parse = -32700,
    /// It is no request.
    InvalidRequest = -32600,
    /// There is no such method, or not yet.
    MethodNotFound = -32601,
    /// The parameters are not what the method takes.
    InvalidParams = -32602,
    /// A fault of our own.
    Internal = -32603,
    /// The VM is not there, not up, or has ended.
    Vm = -32000,
    /// The command could not be run to its end.
    Exec = -32001,
    /// The file could not be read or written.
    File = -32002,
    /// It was cancelled.
    Cancelled = -32003,
    /// A limit of the session is reached.
    Busy = -32004,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RpcError {
    pub(super) code: Code,
    pub(super) message: String,
}

impl RpcError {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(super) fn params(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidParams, message)
    }

    pub(super) fn cancelled() -> Self {
        Self::new(Code::Cancelled, "cancelled")
    }

    pub(super) fn failure(code: Code, failure: &Failure) -> Self {
        Self::new(code, failure.message.clone())
    }
}

pub(super) type RpcResult = Result<Value, RpcError>;

/// What of a line is known before its parameters are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// `None` for a notification: nobody waits for an answer.
    pub(super) id: Option<Id>,
    pub(super) method: String,
}

/// A line that is no request, and whom to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) id: Option<Id>,
    pub(super) error: RpcError,
}

#[derive(Deserialize)]
struct RawHeader<'a> {
    #[serde(borrow)]
    jsonrpc: Option<Cow<'a, str>>,
    #[serde(borrow)]
    method: Option<Cow<'a, str>>,
    #[serde(default, deserialize_with = "given")]
    id: Option<Value>,
    #[serde(default, rename = "params")]
    _params: IgnoredAny,
}

/// Keeps `null` apart from what is not there.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Reads what kind of request a line is.
///
/// # Errors
/// Why it is none.
pub(super) fn header(line: &[u8]) -> Result<Header, Refused> {
    let refuse = |id, code, message: String| Refused { id, error: RpcError::new(code, message) };
    let first = line.iter().find(|byte| !byte.is_ascii_whitespace());
    if first == Some(&b'[') {
        let text = "batches are not supported: send one request per line";
        return Err(refuse(None, Code::InvalidRequest, text.into()));
    }
    let raw: RawHeader<'_> = serde_json::from_slice(line).map_err(|error| {
        if error.is_data() && first != Some(&b'{') {
            let text = "Invalid request: a request is an object";
            return refuse(None, Code::InvalidRequest, text.into());
        }
        let code = if error.is_data() { Code::InvalidRequest } else { Code::Parse };
        let what = if error.is_data() { "Invalid request" } else { "Parse error" };
        refuse(id_in(line), code, format!("{what}: {}", without_place(&error)))
    })?;
    let id = match &raw.id {
        None => None,
        Some(value) => Some(Id::of(value).ok_or_else(|| {
            let text = format!(
                "Invalid request: an id is a whole number from 0, or a text of at most {MAX_ID_BYTES} bytes"
            );
            refuse(None, Code::InvalidRequest, text)
        })?),
    };
    if raw.jsonrpc.as_deref() != Some("2.0") {
        let text = "Invalid request: \"jsonrpc\" must be \"2.0\"";
        return Err(refuse(id, Code::InvalidRequest, text.into()));
    }
    let Some(method) = raw.method else {
        return Err(refuse(id, Code::InvalidRequest, "Invalid request: no method".into()));
    };
    Ok(Header { id, method: method.into_owned() })
}

/// The id in a line that may be cut or malformed, if it comes before that.
pub(super) fn id_in(line: &[u8]) -> Option<Id> {
    let found = RefCell::new(None);
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    // It ends with an error in any case: at the id, or where the line is cut.
    drop(FindId(&found).deserialize(&mut deserializer));
    found.into_inner().as_ref().and_then(Id::of)
}

struct FindId<'a>(&'a RefCell<Option<Value>>);

impl<'de> DeserializeSeed<'de> for FindId<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FindId<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            if key == "id" {
                self.0.replace(Some(map.next_value()?));
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// The parameters of a request; those that are not given are as in an empty object.
///
/// # Errors
/// What is wrong with them.
pub(super) fn params<'a, P: Deserialize<'a>>(line: &'a [u8]) -> Result<P, RpcError> {
    #[derive(Deserialize)]
    struct Envelope<P> {
        params: Option<Named<P>>,
    }
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let envelope: Envelope<P> = serde_path_to_error::deserialize(&mut deserializer)
        .map_err(|error| wrong_param(&error.path().to_string(), error.inner()))?;
    let given = envelope.params.map(|Named(params)| params);
    given.map_or_else(|| serde_json::from_str("{}").map_err(|e| wrong_param("params", &e)), Ok)
}

/// Which parameter is wrong, and what it should be, in words that are not Rust's.
fn wrong_param(path: &str, error: &serde_json::Error) -> RpcError {
    let name = path.strip_prefix("params.").unwrap_or("params");
    let text = without_place(error);
    let words = [
        ("u64", "a whole number"),
        ("u32", "a whole number"),
        ("u16", "a whole number below 65536"),
        ("f64", "a number"),
    ];
    let text = words.iter().fold(text, |text, (rust, word)| {
        text.replace(&format!("expected {rust}"), &format!("expected {word}"))
    });
    RpcError::params(format!("{name}: {text}"))
}

/// What has its fields by their names: a list would be taken for them in their order.
struct Named<P>(P);

impl<'de, P: Deserialize<'de>> Deserialize<'de> for Named<P> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<P>(PhantomData<P>);

        impl<'de, P: Deserialize<'de>> Visitor<'de> for Fields<P> {
            type Value = Named<P>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Named<P>, A::Error> {
                P::deserialize(MapAccessDeserializer::new(map)).map(Named)
            }
        }

        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// An error of the parser without its place: a line number says nothing where each line is a request.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rfind(" at line ").map_or(text.clone(), |at| text[..at].to_owned())
}

fn line_of(message: &impl Serialize) -> Bytes {
    match serde_json::to_vec(message) {
        Ok(mut line) => {
            line.push(b'\n');
            line.into()
        }
        Err(error) => {
            // Not with these types: their keys are texts.
            tracing::error!(%error, "a message could not be written as JSON");
            Bytes::new()
        }
    }
}

/// The line that answers a request.
pub(super) fn response(id: Option<&Id>, result: &RpcResult) -> Bytes {
    #[derive(Serialize)]
    struct Response<'a> {
        jsonrpc: &'static str,
        id: Option<&'a Id>,
        #[serde(skip_serializing_if = "Option::is_none")]
        result: Option<&'a Value>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<ErrorObject<'a>>,
    }
    #[derive(Serialize)]
    struct ErrorObject<'a> {
        code: i32,
        message: &'a str,
    }
    let error = result.as_ref().err();
    let error = error.map(|e| ErrorObject { code: e.code as i32, message: &e.message });
    line_of(&Response { jsonrpc: "2.0", id, result: result.as_ref().ok(), error })
}

/// The line of a notification.
pub(super) fn notification(method: &str, params: &impl Serialize) -> Bytes {
    #[derive(Serialize)]
    struct Notification<'a, P> {
        jsonrpc: &'static str,
        method: &'a str,
        params: &'a P,
    }
    line_of(&Notification { jsonrpc: "2.0", method, params })
}

/// Bytes as they travel in JSON.
pub(super) fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Bytes as they have travelled in JSON.
///
/// # Errors
/// When they are no base64.
pub(super) fn decode(name: &str, text: &str) -> Result<Vec<u8>, RpcError> {
    STANDARD.decode(text).map_err(|e| RpcError::params(format!("{name} is not base64: {e}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refusal(line: &str) -> (Option<Id>, i32) {
        let refused = header(line.as_bytes()).unwrap_err();
        (refused.id, refused.error.code as i32)
    }

    #[test]
    fn a_request_has_a_method_and_perhaps_an_id() {
        let read = |line: &str| header(line.as_bytes()).unwrap();
        let request = read(r#"{"jsonrpc":"2.0","method":"exec","id":7,"params":{"command":"x"}}"#);
        assert_eq!(request, Header { id: Some(Id::Number(7)), method: "exec".into() });
        let request = read(r#"{"id":"a","method":"\u006cist","jsonrpc":"2.0"}"#);
        assert_eq!(request, Header { id: Some(Id::Text("a".into())), method: "list".into() });
        assert_eq!(read(r#"{"jsonrpc":"2.0","method":"log"}"#).id, None);
    }

    #[test]
    fn what_is_no_request_is_refused_by_name() {
        let seven = Some(Id::Number(7));
        for (line, id, code) in [
            ("{", None, -32700),
            ("nonsense", None, -32700),
            (r#"{"jsonrpc":"2.0","id":7,"method":"x""#, seven.clone(), -32700),
            (r#"{"id":7,"method":"x"} trailing"#, seven.clone(), -32700),
            ("[]", None, -32600),
            (r#" [{"jsonrpc":"2.0","method":"x","id":1}]"#, None, -32600),
            ("7", None, -32600),
            (r#"{"id":7,"method":"x"}"#, seven.clone(), -32600),
            (r#"{"jsonrpc":"1.0","id":7,"method":"x"}"#, seven.clone(), -32600),
            (r#"{"jsonrpc":"2.0","id":7}"#, seven.clone(), -32600),
            (r#"{"jsonrpc":"2.0","id":7,"method":3}"#, seven, -32600),
            (r#"{"jsonrpc":"2.0","id":null,"method":"x"}"#, None, -32600),
            (r#"{"jsonrpc":"2.0","id":-1,"method":"x"}"#, None, -32600),
            (r#"{"jsonrpc":"2.0","id":1.5,"method":"x"}"#, None, -32600),
            (r#"{"jsonrpc":"2.0","id":{},"method":"x"}"#, None, -32600),
        ] {
            assert_eq!(refusal(line), (id, code), "{line}");
        }
    }

    #[test]
    fn parameters_that_are_not_given_are_none() {
        #[derive(Debug, PartialEq, Deserialize)]
        struct Params<'a> {
            #[serde(borrow, default)]
            path: Option<Cow<'a, str>>,
        }
        let given: Params<'_> = params(br#"{"params":{"path":"/x"}}"#).unwrap();
        assert_eq!(given.path.as_deref(), Some("/x"));
        for line in [r#"{"id":1}"#, r#"{"params":null}"#, r#"{"params":{}}"#] {
            assert_eq!(params::<Params<'_>>(line.as_bytes()).unwrap().path, None);
        }
        let error = params::<Params<'_>>(br#"{"params":["/x"]}"#).unwrap_err();
        assert_eq!(error.code, Code::InvalidParams);
        assert!(!error.message.contains("line 1"), "{}", error.message);
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(header(&line));
            drop(id_in(&line));
        }

        #[test]
        fn an_id_is_found_wherever_the_line_is_cut_after_it(id in any::<u64>(), cut in 0_usize..60) {
            let line = format!(
                r#"{{"jsonrpc":"2.0","method":"write_file","id":{id},"params":{{"content":"AAAA","path":"/x"}}}}"#
            );
            let after = line.find(",\"params").unwrap() + 1;
            let cut = line.len().min(after + cut);
            prop_assert_eq!(id_in(&line.as_bytes()[..cut]), Some(Id::Number(id)));
        }
    }
}
