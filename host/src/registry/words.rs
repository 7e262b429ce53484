//! What a registry says in words, made fit for one line of ours.

use serde::Deserialize;

/// The most characters of a registry that are shown.
const SHOWN: usize = 200;

#[derive(Deserialize)]
struct Errors {
    errors: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    code: Option<String>,
    message: Option<String>,
}

/// The error in the body of an answer: its code, if the registry gave one, and its words.
pub(super) fn error(body: &[u8]) -> (Option<String>, String) {
    let parsed: Option<Errors> = serde_json::from_slice(body).ok();
    let first = parsed.and_then(|all| all.errors.into_iter().next());
    match first {
        Some(One { code, message }) => {
            let words = [code.as_deref(), message.as_deref()];
            let words: Vec<&str> = words.into_iter().flatten().filter(|w| !w.is_empty()).collect();
            let words = line(&words.join(": "));
            (code, words)
        }
        None if is_markup(body) => (None, "a page of HTML".to_owned()),
        None => (None, line(&String::from_utf8_lossy(body))),
    }
}

/// Whether this is a page for people.
pub(super) fn is_markup(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'<')
}

/// Whether a terminal does something else with it than show it: controls, what turns the direction of
/// what follows, what joins and what has no width.
pub(crate) fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// One line of a stranger: nothing that is not seen as it is, blanks joined, and not too long.
pub(super) fn line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut shown: String = words
        .join(" ")
        .chars()
        .take(SHOWN)
        .flat_map(|c| if is_unseen(c) { c.escape_default().collect() } else { vec![c] })
        .collect();
    if words.join(" ").chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_words_are_one_line() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\n  \u001b[31mway","detail":{}}]}"#;
        let (code, words) = error(body);
        assert_eq!((code.as_deref(), &*words), (Some("DENIED"), "DENIED: no \\u{1b}[31mway"));
        let turned = "{\"errors\":[{\"message\":\"no\u{202e}yaw\u{200b}\"}]}";
        assert_eq!(error(turned.as_bytes()).1, "no\\u{202e}yaw\\u{200b}");
        assert_eq!(line("schön, 日本"), "schön, 日本");
        assert_eq!(error(b" <html>"), (None, "a page of HTML".to_owned()));
        assert_eq!(error(b"plain\ntext"), (None, "plain text".to_owned()));
        assert_eq!(error(&[b'x'; 1000]).1.chars().count(), SHOWN + 1);
        assert_eq!(error(b"{\"errors\":[]}").1, "{\"errors\":[]}");
    }
}
