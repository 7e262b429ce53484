//! A terminal whose program panics. (That it is given back when the panic ends the program, the
//! suite sees at the points `exec.terminal`.)

use matchlock_test_support::netns::Namespace;
use matchlock_test_support::{Terminal, wait_until};

use super::case::{PATIENCE, Stage};

/// A task of the owner panics while the terminal is raw: it is told on whole lines, and the guest's
/// shell goes on as if nothing had been.
#[test]
fn a_panic_elsewhere_is_told_on_whole_lines_and_the_terminal_stays_raw() {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    let stage = Stage::new(&net, None).unwrap();
    let args = ["run", "-it", "-e", "PS1=ready> ", "--image", "busybox", "--", "sh"];
    let panics = "owner.exec.before=1*return(panic)";
    let mut shell = Terminal::start(&stage.command(panics, &args)).unwrap();
    shell.expect("ready> ").unwrap();
    let vm = stage.installation.wait_for_status("running").unwrap();
    let asked = stage.start("", &["exec", &vm, "--", "true"]).unwrap().wait(PATIENCE).unwrap();
    assert_eq!(asked.status.code(), Some(125), "{asked:?}");
    shell.expect("panicked at").unwrap();
    let raw = || Ok(!shell.is_as_before()?);
    wait_until(PATIENCE, "raw mode", raw).unwrap();
    shell.keys("echo $((6*7))\r").unwrap();
    shell.expect("42\r\n").unwrap();
    let printed = String::from_utf8_lossy(shell.output()).into_owned();
    let bare = printed.replace("\r\n", "");
    assert!(!bare.contains('\n'), "a line does not end as it should: {printed:?}");
    shell.keys("exit 8\r").unwrap();
    assert_eq!(shell.finish().unwrap(), Some(8));
    stage.installation.assert_nothing_left().unwrap();
}
