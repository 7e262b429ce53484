//! Help texts: written in lines as everything else in the source, shown as wide as the terminal is.

use clap::Command;

/// The same command, with the paragraphs below its options in one line each: the terminal's width is
/// what wraps them, and nothing else. Lines that begin with a space stay as they are.
pub(super) fn unfolded(command: Command) -> Command {
    let text = command.get_after_help().map(|text| unfold(&text.to_string()));
    let command = match text {
        Some(text) => command.after_help(text),
        None => command,
    };
    command.mut_subcommands(unfolded)
}

fn unfold(text: &str) -> String {
    let mut unfolded = String::new();
    let mut before = "";
    for line in text.lines() {
        let is_prose = |line: &str| !line.is_empty() && !line.starts_with(' ');
        // A heading is a paragraph of its own.
        let goes_on = is_prose(before) && is_prose(line) && !before.ends_with(':');
        if !unfolded.is_empty() || !before.is_empty() {
            unfolded.push(if goes_on { ' ' } else { '\n' });
        }
        unfolded.push_str(line);
        before = line;
    }
    unfolded
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::super::Cli;
    use super::*;

    /// The narrowest terminal that lists and examples are made for.
    const NARROW: usize = 80;

    #[test]
    fn paragraphs_are_one_line_and_lists_stay() {
        let text = "One\ntwo.\n\nExamples:\n  a\n  b\n\nThree:\nfour";
        assert_eq!(unfold(text), "One two.\n\nExamples:\n  a\n  b\n\nThree:\nfour");
    }

    #[test]
    fn what_is_not_wrapped_fits_a_narrow_terminal() {
        let mut commands = vec![unfolded(Cli::command())];
        while let Some(command) = commands.pop() {
            let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in text.lines().filter(|line| line.starts_with(' ')) {
                assert!(line.len() <= NARROW, "{}: {line}", command.get_name());
            }
            commands.extend(command.get_subcommands().cloned());
        }
    }
}
