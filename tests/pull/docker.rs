//! Debian's `docker-registry`, on a free port of loopback.

use std::fs;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use matchlock_test_support::wait_until;
use tempfile::TempDir;

use super::{PATIENCE, stderr};

/// How it is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    Http,
    /// With a certificate of a CA of the test's own, and a login: [`USER`], [`PASSWORD`].
    TlsWithLogin,
}

pub(crate) const USER: &str = "someone";
pub(crate) const PASSWORD: &str = "correct horse";
/// What `htpasswd -B` makes of them.
const HTPASSWD: &str = "someone:$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n";

/// The registry; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct DockerRegistry {
    dir: TempDir,
    host: String,
    process: Child,
    door: Door,
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
}

impl DockerRegistry {
    pub(crate) fn start(door: Door) -> Self {
        let dir = tempfile::Builder::new().prefix("mlregistry").tempdir().unwrap();
        // Free now, and the kernel does not give it to others soon.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = dir.path().display();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\n\
             http:\n  addr: 127.0.0.1:{port}\n"
        );
        if door == Door::TlsWithLogin {
            certificates(dir.path());
            fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
            config.push_str(&format!(
                "  tls: {{certificate: {path}/host.pem, key: {path}/host.key}}\n\
                 auth: {{htpasswd: {{realm: test, path: {path}/htpasswd}}}}\n"
            ));
        }
        let file = dir.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        // It goes with this thread, however that ends.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry: run scripts/setup.sh");
        wait_until(
            PATIENCE,
            "the registry",
            || Ok(TcpStream::connect(("127.0.0.1", port)).is_ok()),
        )
        .unwrap();
        Self { dir, host: format!("127.0.0.1:{port}"), process, door }
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// The certificate of the test's CA.
    pub(crate) fn ca(&self) -> std::path::PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Copies an image into it, in skopeo's words.
    pub(crate) fn push(&self, from: &str, image: &str, flags: &[&str]) {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]);
        if self.door == Door::TlsWithLogin {
            command.arg(format!("--dest-creds={USER}:{PASSWORD}"));
        }
        run(command.args(flags).arg(from).arg(format!("docker://{}/{image}", self.host)));
    }

    /// How often it has sent a blob, as its log says.
    pub(crate) fn blobs_sent(&self) -> usize {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
        let sent = |line: &&str| {
            line.contains("\"GET /v2/") && line.contains("/blobs/") && line.contains("\" 200 ")
        };
        log.lines().filter(sent).count()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait().map(drop)) {
            eprintln!("could not end the registry: {error}");
        }
    }
}

/// A CA, and a certificate of it for 127.0.0.1.
fn certificates(dir: &Path) {
    let mut extensions = fs::File::create(dir.join("extensions")).unwrap();
    extensions.write_all(b"subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n").unwrap();
    let openssl = |args: &[&str]| run(Command::new("openssl").args(args).current_dir(dir));
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let ca = ["-x509", "-subj", "/CN=test CA", "-days", "7", "-keyout", "ca.key", "-out", "ca.pem"];
    openssl(&[&["req"][..], &key, &ca].concat());
    let host = ["-subj", "/CN=127.0.0.1", "-keyout", "host.key", "-out", "host.csr"];
    openssl(&[&["req"][..], &key, &host].concat());
    openssl(&[
        "x509",
        "-req",
        "-in",
        "host.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "7",
        "-extfile",
        "extensions",
        "-out",
        "host.pem",
    ]);
}
