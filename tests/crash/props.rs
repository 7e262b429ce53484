//! What a case puts on the host itself.

use std::fs;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use matchlock_test_support::netns::Namespace;

use super::case::Stage;
use super::host::{self, Lines};

/// Things that stand in for what a VM of an older kernel, or a badly timed kill, would leave, and
/// things of a stranger that look alike.
#[derive(Default)]
pub(crate) struct Props {
    hypervisor: Option<Child>,
    strangers_hypervisor: Option<Child>,
    pub(crate) strangers: Lines,
}

impl Props {
    /// Gives a crashed VM a hypervisor that did not die, a TAP and tables; and a stranger the same.
    pub(crate) fn dress(stage: &Stage<'_>, vm: &str) -> Result<Self> {
        let install = fs::read_to_string(stage.installation.home().join("install-id"))?;
        let mark = format!("matchlock:{}:{vm}", install.trim());
        let tap = format!("fc-{}", vm.strip_prefix("vm-").context("a VM's id")?);
        stage.net.sh(&props(STRANGER, "matchlock:00112233aabbccdd:vm-0badbeef"))?;
        let after = host::kernel(stage.net, &stage.installation)?;
        let without = |line: &&String| !line.contains("process ");
        let strangers = after.iter().filter(without).cloned().collect();
        stage.net.sh(&props(&tap, &mark))?;
        let strangers_mark = format!("matchlock:00112233aabbccdd:{vm}");
        Ok(Self {
            hypervisor: Some(stand_in(&mark)?),
            strangers_hypervisor: Some(stand_in(&strangers_mark)?),
            strangers,
        })
    }

    /// The stand-in must have been ended by `gc`, the stranger's not.
    pub(crate) fn end(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        if is_alive(self.hypervisor.take())? == Some(true) {
            wrong.push("the hypervisor lives".to_owned());
        }
        if is_alive(self.strangers_hypervisor.take())? == Some(false) {
            wrong.push("a stranger's hypervisor was ended".to_owned());
        }
        Ok(wrong)
    }

    /// Takes the stranger's things away.
    pub(crate) fn clear(&self, net: &Namespace) -> Result<()> {
        if !self.strangers.is_empty() {
            net.sh(&format!("ip link del {STRANGER}; nft flush ruleset"))?;
        }
        Ok(())
    }
}

/// It waits for its stdin, which the test holds; its argv is what a hypervisor is known by.
fn stand_in(mark: &str) -> Result<Child> {
    let mut command = Command::new("sh");
    Ok(command.args(["-c", "read _", "sh", "-name", mark]).stdin(Stdio::piped()).spawn()?)
}

/// Whether a child lives; then it is ended.
fn is_alive(child: Option<Child>) -> Result<Option<bool>> {
    let Some(mut child) = child else { return Ok(None) };
    if child.try_wait()?.is_some() {
        return Ok(Some(false));
    }
    child.kill()?;
    child.wait()?;
    Ok(Some(true))
}

const STRANGER: &str = "fc-0badbeef";

fn props(tap: &str, mark: &str) -> String {
    format!(
        "ip tuntap add {tap} mode tap; ip link set {tap} alias '{mark}'
         nft add table inet matchlock_{tap} '{{ comment \"{mark}\"; }}'
         nft add table ip matchlock_nat_{tap} '{{ comment \"{mark}\"; }}'"
    )
}
