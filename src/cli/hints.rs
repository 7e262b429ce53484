//! What to write instead of words that other tools have for the same thing.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Verbs of docker and podman, and ours.
const VERBS: &[(&str, &str)] = &[
    ("ps", "list"),
    ("stop", "kill"),
    ("images", "image ls"),
    ("rmi", "image rm"),
    ("load", "image import"),
    ("start", "run -d"),
];

/// Flags of `run` there, and what to do here.
const FLAGS: &[(&str, &str)] = &[
    ("-m", "use --memory MB"),
    ("--name", "microVMs have ids, no names: `matchlock run -d` prints one, `matchlock list` all"),
    ("--network", "each microVM has a network of its own; --no-network leaves it out"),
];

/// The line that helps with this refusal, if there is one.
pub(super) fn instead(error: &clap::Error, verb: &str) -> Option<String> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let given = named(ContextKind::InvalidSubcommand)?;
            let (_, ours) = VERBS.iter().find(|(theirs, _)| *theirs == given)?;
            Some(format!("there is no `matchlock {given}`; use `matchlock {ours}`"))
        }
        ErrorKind::UnknownArgument if verb == "run" => {
            let given = named(ContextKind::InvalidArg)?;
            let (flag, instead) = FLAGS.iter().find(|(theirs, _)| *theirs == given)?;
            Some(format!("`matchlock run` has no {flag}: {instead}; see `matchlock run --help`"))
        }
        ErrorKind::MissingRequiredArgument if verb == "run" => Some(
            "the image is named with --image, e.g. `matchlock run --image busybox -- sh`; \
             see `matchlock run --help`"
                .to_owned(),
        ),
        _ => None,
    }
}
