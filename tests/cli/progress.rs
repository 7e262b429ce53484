//! What is said on stderr besides errors: notes, progress, the log; and when none of it is.

use std::fs::File;
use std::process::{Command, Output, Stdio};

use matchlock_test_support::{Installation, busybox_archive, program};

/// An import of busybox with these flags, its stderr not a terminal.
fn imported(flags: &[&str]) -> Output {
    let installation = Installation::without_images().unwrap();
    let args = [flags, &["image", "import", "busybox"]].concat();
    let archive = File::open(busybox_archive().unwrap()).unwrap();
    installation.command(&args).unwrap().stdin(archive).output().unwrap()
}

/// The same on a terminal of its own (that of `script`): what it shows.
fn on_a_terminal(flags: &str, term: &str) -> String {
    let installation = Installation::without_images().unwrap();
    let (program, archive) = (program().unwrap(), busybox_archive().unwrap());
    let line =
        format!("{} {flags} image import busybox < {}", program.display(), archive.display());
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).env("TERM", term);
    let output = installation.prepare(&mut script).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

const LINE: &str = "importing busybox from stdin...";

#[test]
fn progress_is_drawn_on_a_terminal_and_gone_before_the_output() {
    let shown = on_a_terminal("", "xterm");
    let drawn = shown.rfind(LINE).unwrap();
    let (progress, output) = shown.split_at(shown.find("Imported: busybox").unwrap());
    assert!(drawn < progress.len(), "{shown:?}");
    assert!(progress.contains("\x1b[2K") && progress.contains(" MiB "), "{shown:?}");
    assert!(progress.trim_end_matches('\r').ends_with("\x1b[2K"), "{shown:?}");
    assert!(!output.contains('\x1b'), "{shown:?}");
}

#[test]
fn lines_are_told_where_nothing_can_be_drawn() {
    let output = imported(&[]);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("matchlock: {LINE}\n"));
    let dumb = on_a_terminal("", "dumb");
    assert!(dumb.contains(LINE) && !dumb.contains('\x1b'), "{dumb:?}");
}

#[test]
fn quiet_is_quiet_but_for_the_output_and_errors() {
    for flags in [&["-q"][..], &["--quiet"]] {
        let output = imported(flags);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert!(String::from_utf8(output.stdout).unwrap().contains("Imported: busybox"));
    }
    let shown = on_a_terminal("-q", "xterm");
    assert!(!shown.contains(LINE) && !shown.contains('\x1b'), "{shown:?}");
    let bare = Installation::bare().unwrap();
    let output = bare.output(&["rm", "-q", "vm-00000001"]).unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("not found"));
}

#[test]
fn the_log_is_as_verbose_as_asked() {
    let bare = Installation::bare().unwrap();
    let logged = |args: &[&str], variable: Option<&str>| {
        let mut command = bare.command(args).unwrap();
        let output = command.envs(variable.map(|value| ("MATCHLOCK_LOG", value))).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(logged(&["gc"], None), "");
    assert!(logged(&["gc"], Some("debug")).contains("DEBUG"));
    for args in
        [&["-vv", "gc"][..], &["--verbose", "--verbose", "gc"], &["gc", "--verbose", "--verbose"]]
    {
        assert!(logged(args, None).contains("DEBUG"), "{args:?}");
    }
    assert_eq!(logged(&["-q", "gc"], Some("debug")), "");
}

#[test]
fn a_filter_that_is_none_is_one_clear_line() {
    let bare = Installation::bare().unwrap();
    for (args, code) in [(&["list"][..], 1), (&["run", "--image", "x", "--", "true"], 125)] {
        let output = bare.command(args).unwrap().env("MATCHLOCK_LOG", "bogus").output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), text.lines().count()), (Some(code), 1), "{text}");
        assert!(text.contains("MATCHLOCK_LOG") && text.contains("\"bogus\""), "{text}");
    }
    let output = bare.output(&["-q", "--verbose", "list"]).unwrap();
    assert_eq!(output.status.code(), Some(2));
}

/// `-v` belongs to the verb behind a verb: `run -v` is a volume.
#[test]
fn v_before_the_verb_is_verbose_and_behind_run_a_volume() {
    let bare = Installation::bare().unwrap();
    let output = bare.output(&["run", "-v", "/a:/b", "--image", "x", "--", "true"]).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(125) && text.contains("--volume"), "{text}");
    assert_eq!(bare.output(&["-v", "list"]).unwrap().status.code(), Some(0));
}
