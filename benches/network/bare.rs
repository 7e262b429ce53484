//! QEMU without Matchlock: the machine of a VM that runs, in a network namespace of its own without
//! any table, on a TAP that `ip` made. Its guest is the VM's kernel with a script as `/init`.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use tempfile::TempDir;

use crate::feed;

pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const TAP: &str = "bare0";
/// As large as a VM's; nothing writes to it.
const DISK_BYTES: u64 = 1 << 30;

/// A QEMU that runs; dropping it ends it, and its namespace goes with it.
pub(crate) struct Bare {
    qemu: Child,
    dir: TempDir,
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Err(error) = self.qemu.kill().and_then(|()| self.qemu.wait().map(drop)) {
            eprintln!("could not end the bare QEMU: {error}");
        }
    }
}

impl Bare {
    /// The machine that a VM's `hypervisor.json` describes, and what its guest runs.
    pub(crate) fn like(description: &Value, script: &str) -> Result<Self> {
        let dir = TempDir::new()?;
        fs::create_dir(dir.path().join("logs"))?;
        File::create(dir.path().join("rootfs.ext4"))?.set_len(DISK_BYTES)?;
        let argv = description["argv"].as_array().context("no argv")?;
        let argv: Vec<&str> = argv.iter().filter_map(Value::as_str).collect();
        let (program, args) = argv.split_first().context("an empty argv")?;
        // Until its exec it is a shell: the namespace and the process are QEMU's from the start.
        let set_up = format!(
            "ip tuntap add dev {TAP} mode tap vnet_hdr
             ip address add {GATEWAY}/24 dev {TAP}; ip link set dev {TAP} up
             echo; exec \"$@\" >logs/qemu.log 2>&1"
        );
        let qemu = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "sh", "-ec", &set_up, "sh", program])
            .args(with_ends_of_its_own(args, dir.path(), script)?)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("setpriv")?;
        let mut bare = Self { qemu, dir };
        let mut line = String::new();
        BufReader::new(bare.qemu.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(!line.is_empty(), "the bare QEMU got no TAP");
        Ok(bare)
    }

    /// A port of its side of the TAP.
    pub(crate) fn listen(&self, port: u16) -> Result<TcpListener> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.qemu.id()))?;
        let listening = std::thread::spawn(move || -> Result<TcpListener> {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?)
        });
        listening.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
    }

    /// What it printed, for whoever waits in vain.
    pub(crate) fn logs(&self) -> String {
        let read = |name: &str| {
            fs::read(self.dir.path().join("logs").join(name)).map_or_else(
                |error| format!("{name}: {error}\n"),
                |text| String::from_utf8_lossy(&text).into_owned(),
            )
        };
        read("qemu.log") + &read("console.log")
    }
}

/// The same arguments, but for what belongs to the VM: its name, its sockets, its TAP, its guest.
fn with_ends_of_its_own(args: &[&str], dir: &Path, script: &str) -> Result<Vec<String>> {
    let mut own = Vec::new();
    let (mut before, mut on_a_tap) = ("", false);
    for &arg in args {
        own.push(match (before, arg.split(',').next().unwrap_or(arg)) {
            ("-name", _) => "bare".to_owned(),
            ("-initrd", _) => initramfs(Path::new(arg), dir, script)?,
            // The control channel and the guest link: nobody is at the other end.
            ("-chardev", "socket") => {
                let id = arg.split(',').find(|part| part.starts_with("id="));
                format!("null,{}", id.context("a socket without a name")?)
            }
            ("-netdev", "tap") => {
                on_a_tap = true;
                let parts = arg.split(',').map(|part| match part.split_once('=') {
                    Some(("fd", _)) => format!("ifname={TAP},script=no,downscript=no"),
                    _ => part.to_owned(),
                });
                parts.collect::<Vec<_>>().join(",")
            }
            _ => arg.to_owned(),
        });
        before = arg;
    }
    ensure!(on_a_tap, "the VM has no network");
    Ok(own)
}

/// The VM's initramfs with its modules, and busybox behind it; the later `/init` counts.
fn initramfs(of_the_vm: &Path, dir: &Path, script: &str) -> Result<String> {
    let (tree, file) = (dir.join("tree"), dir.join("initramfs"));
    fs::create_dir_all(tree.join("bin"))?;
    // The image's busybox is the host's (scripts/busybox-image.sh).
    feed("sh", &["-ec", "cp -L \"$(command -v busybox)\" \"$0\"", path(&tree.join("bin"))?], "")?;
    let init = format!(
        "#!/bin/busybox sh\n\
         set -e\n\
         /bin/busybox mount -t proc proc /proc\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin\n\
         mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         for module in $(cat /modules/order); do insmod /modules/$module; done\n\
         ip link set lo up; ip addr add {GUEST}/24 dev eth0; ip link set eth0 up\n\
         {script}\n\
         sleep 1000000\n"
    );
    fs::write(tree.join("init"), init)?;
    feed("chmod", &["0755", path(&tree.join("init"))?], "")?;
    fs::copy(of_the_vm, &file)?;
    let archive = "cd \"$0\"; find . -mindepth 1 | cpio -o -H newc --quiet";
    let archive = Command::new("sh").args(["-ec", archive, path(&tree)?]).output()?;
    ensure!(archive.status.success(), "cpio: {}", String::from_utf8_lossy(&archive.stderr));
    let mut out = File::options().write(true).open(&file)?;
    // The kernel wants each archive at a multiple of four bytes; cpio fills blocks of 512.
    let end = out.seek(SeekFrom::End(0))?;
    ensure!(end % 4 == 0, "{} has an odd length", of_the_vm.display());
    std::io::Write::write_all(&mut out, &archive.stdout)?;
    Ok(path(&file)?.to_owned())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}
