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
    ("create", "run -d"),
    ("import", "image import"),
    ("tag", "image tag"),
];

/// Verbs that have no other name here, and what to do.
const OTHERWISE: &[(&str, &str)] = &[
    ("wait", "`matchlock get ID` has the exit_code once the command has ended"),
    ("cp", "use `matchlock exec -i ID -- tar x < FILE.tar`, or write_file of `matchlock rpc`"),
    (
        "attach",
        "`matchlock log -f ID` follows the output, `matchlock exec -it ID -- sh` is a shell",
    ),
    ("top", "use `matchlock exec ID -- ps`"),
    ("stats", "use `matchlock exec ID -- top -bn1`"),
    ("restart", "a microVM runs once: `matchlock kill ID`, then `matchlock run -d`"),
    ("pause", "microVMs are not paused"),
    ("system", "use `matchlock gc`, and `matchlock prune` for stopped microVMs"),
    ("container", "its verbs are ours without it, e.g. `matchlock list`"),
    ("info", "use `matchlock diagnose` or `matchlock version`"),
];

/// Flags of `run` there, and what to do here.
const FLAGS: &[(&str, &str)] = &[
    ("-m", "use --memory MB"),
    ("--name", "microVMs have ids, no names: `matchlock run -d` prints one, `matchlock list` all"),
    ("--network", "each microVM has a network of its own; --no-network leaves it out"),
];

/// What was probably meant.
fn similar(error: &clap::Error) -> Option<String> {
    let similar = match error.get(ContextKind::SuggestedSubcommand)? {
        ContextValue::Strings(names) => names.last()?,
        ContextValue::String(name) => name,
        _ => return None,
    };
    Some(format!("did you mean `{similar}`?"))
}

/// The line that helps with this refusal, if there is one.
pub(super) fn instead(error: &clap::Error, verb: &str) -> Option<String> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let given = named(ContextKind::InvalidSubcommand)?;
            if verb == "image" {
                let similar = similar(error);
                let instead = match given {
                    "pull" | "build" => format!("use `matchlock {given}`"),
                    "prune" => "use `matchlock image gc`".to_owned(),
                    _ => similar.unwrap_or_else(|| "see `matchlock image --help`".to_owned()),
                };
                return Some(format!("there is no `matchlock image {given}`; {instead}"));
            }
            if let Some((_, ours)) = VERBS.iter().find(|(theirs, _)| *theirs == given) {
                return Some(format!("there is no `matchlock {given}`; use `matchlock {ours}`"));
            }
            let otherwise = OTHERWISE.iter().find(|(theirs, _)| *theirs == given);
            let instead = otherwise.map(|(_, instead)| (*instead).to_owned());
            let instead = instead.or_else(|| similar(error))?;
            Some(format!("there is no `matchlock {given}`; {instead}"))
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            Some(if matches!(verb, "image" | "guest") {
                format!("which? See `matchlock {verb} --help`")
            } else {
                "what is to be done? E.g. `matchlock run --image busybox -- sh`; see \
                 `matchlock --help`"
                    .to_owned()
            })
        }
        ErrorKind::UnknownArgument if verb == "image" => {
            let given = named(ContextKind::InvalidArg)?;
            std::path::Path::new(given).is_file().then(|| {
                format!("an archive is read from stdin: matchlock image import TAG < {given}")
            })
        }
        ErrorKind::UnknownArgument if verb == "run" => {
            let given = named(ContextKind::InvalidArg)?;
            let (flag, instead) = FLAGS.iter().find(|(theirs, _)| *theirs == given)?;
            Some(format!("`matchlock run` has no {flag}: {instead}; see `matchlock run --help`"))
        }
        ErrorKind::MissingRequiredArgument if verb == "run" && pulls_by_a_word() => Some(
            "a policy is written with `=`: --pull=always, --pull=missing, --pull=never".to_owned(),
        ),
        ErrorKind::MissingRequiredArgument if verb == "run" => Some(
            "the image is named with --image, e.g. `matchlock run --image busybox -- sh`; \
             see `matchlock run --help`"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Whether `--pull` is followed by a policy as a word of its own, which is the command then.
fn pulls_by_a_word() -> bool {
    let words: Vec<_> = std::env::args_os().collect();
    words.windows(2).any(|pair| {
        matches!(pair, [pull, policy] if pull == "--pull"
            && ["always", "missing", "never"].iter().any(|word| policy == word))
    })
}
