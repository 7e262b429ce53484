//! Against Debian's `docker-registry`, with images that `skopeo` has put there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use matchlock_test_support::{Installation, busybox_archive, wait_until};

use super::docker::{DockerRegistry, Door, PASSWORD, USER};
use super::{
    PATIENCE, assert_no_vm_left, assert_nothing_of_images_left, pull, pulled, refusal, stderr,
    stdout,
};

fn busybox() -> String {
    format!("docker-archive:{}", busybox_archive().unwrap().display())
}

#[test]
fn a_pulled_image_boots_and_is_not_pulled_again() {
    let registry = DockerRegistry::start(Door::Http);
    registry.push(&busybox(), "tools/busybox:1", &[]);
    let installation = Installation::without_images().unwrap();
    let host = registry.host();
    let name = format!("{host}/tools/busybox:1");
    let run = |flags: &[&str]| {
        let mut args = vec!["-q", "run", "--no-network", "--insecure-registry", host];
        args.extend(flags);
        args.extend(["--image", &name, "--", "echo", "hello"]);
        installation.output(&args).unwrap()
    };
    let never = run(&["--pull=never"]);
    assert_eq!(never.status.code(), Some(125));
    assert!(stderr(&never).contains("image not found"), "{}", stderr(&never));
    for (flags, blobs) in [(&[][..], 2), (&[], 2), (&["--pull"], 2), (&["--pull=never"], 2)] {
        let output = run(flags);
        assert_eq!((stdout(&output), stderr(&output)), ("hello\n".into(), String::new()));
        assert_eq!(registry.blobs_sent(), blobs, "config and layer, once");
    }
    // It is found as it is complete, and removed with all that was downloaded for it.
    let listed = stdout(&installation.output(&["image", "ls"]).unwrap());
    assert!(listed.contains(&name) && listed.contains("registry"), "{listed}");
    pulled(&installation.output(&["image", "rm", &name]).unwrap());
    assert_nothing_of_images_left(&installation);
}

#[test]
fn layers_of_every_compression_are_pulled() {
    let registry = DockerRegistry::start(Door::Http);
    let installation = Installation::bare().unwrap();
    for (tag, flags) in [
        ("gzip", &["--dest-compress-format", "gzip", "--format", "oci"][..]),
        ("zstd", &["--dest-compress-format", "zstd", "--format", "oci"]),
        ("docker", &["--format", "v2s2"]),
    ] {
        registry.push(&busybox(), &format!("busybox:{tag}"), flags);
        pulled(&pull(&installation, registry.host(), &format!("busybox:{tag}")));
    }
    // All three are the same files: one root filesystem.
    let blobs = super::files(installation.cache().join("images/blobs"));
    assert_eq!(blobs.len(), 1, "{blobs:?}");
}

/// An OCI layout that `umoci` makes: a small root filesystem, one layer on another.
fn umoci_layout(dir: &Path) -> PathBuf {
    let layout = dir.join("layout");
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/motd"), "made by umoci\n").unwrap();
    let umoci = |args: &[&str]| {
        let output = Command::new("umoci").args(args).output().unwrap();
        assert!(output.status.success(), "umoci {args:?}: {}", stderr(&output));
    };
    let image = format!("{}:tools", layout.display());
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    umoci(&["new", "--image", &image]);
    umoci(&["insert", "--image", &image, tree.join("etc").to_str().unwrap(), "/etc"]);
    umoci(&["insert", "--image", &image, "/bin/busybox", "/bin/busybox"]);
    umoci(&[
        "config",
        "--image",
        &image,
        "--config.cmd",
        "/bin/busybox",
        "--config.cmd",
        "cat",
        "--config.cmd",
        "/etc/motd",
    ]);
    layout
}

#[test]
fn an_image_of_other_tools_with_its_own_command_boots() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let registry = DockerRegistry::start(Door::Http);
    registry.push(&format!("oci:{}:tools", layout.display()), "made/by/umoci", &[]);
    let installation = Installation::without_images().unwrap();
    let name = format!("{}/made/by/umoci", registry.host());
    let output = installation
        .output(&["run", "--no-network", "--insecure-registry", registry.host(), "--image", &name])
        .unwrap();
    assert_eq!(stdout(&output), "made by umoci\n", "{}", stderr(&output));
    assert!(stderr(&output).contains("pulling"), "{}", stderr(&output));
    assert_no_vm_left(&installation);
}

#[test]
fn a_detached_vm_runs_what_was_pulled_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let registry = DockerRegistry::start(Door::Http);
    registry.push(&format!("oci:{}:tools", layout.display()), "some/where:1", &[]);
    let installation = Installation::without_images().unwrap();
    let name = format!("{}/some/where:1", registry.host());
    // An image of the same name that was made here hides the registry's, until that is asked for.
    let archive = fs::File::open(busybox_archive().unwrap()).unwrap();
    let mut import = installation.command(&["image", "import", &name]).unwrap();
    assert!(import.stdin(archive).status().unwrap().success());
    let mut args = vec!["-q", "run", "-d", "--no-network", "--pull=always"];
    args.extend(["--insecure-registry", registry.host(), "--image", &name]);
    let asked = installation.output(&args).unwrap();
    assert_eq!((asked.status.code(), stderr(&asked).as_str()), (Some(0), ""));
    let vm = stdout(&asked).trim_end().to_owned();
    let logged = || stdout(&installation.output(&["log", &vm]).unwrap());
    let has_said = || Ok(logged().contains("made by umoci"));
    wait_until(PATIENCE, "the words of the registry's image", has_said).unwrap();
    // Kept with its VM, which stays without its command.
    pulled(&installation.output(&["kill", &vm]).unwrap());
    let stopped = || Ok(installation.list()?.iter().all(|(_, status)| status == "stopped"));
    wait_until(PATIENCE, "the end of the VM", stopped).unwrap();
    pulled(&installation.output(&["rm", &vm]).unwrap());
    assert_no_vm_left(&installation);
}

#[test]
fn a_private_registry_wants_its_ca_and_a_login() {
    let registry = DockerRegistry::start(Door::TlsWithLogin);
    registry.push(&busybox(), "private:1", &[]);
    let installation = Installation::bare().unwrap();
    let home = installation.home();
    fs::create_dir_all(&home).unwrap();
    let name = format!("{}/private:1", registry.host());
    let pull = |docker: &str, environment: &[(&str, &Path)]| {
        let dir = home.with_file_name(format!("docker-{docker}"));
        let mut command = installation.command(&["-q", "pull", &name]).unwrap();
        command.env("DOCKER_CONFIG", dir).env_remove("SSL_CERT_FILE");
        command.envs(environment.iter().copied()).output().unwrap()
    };
    let login = |docker: &str, text: &str| {
        let dir = home.with_file_name(format!("docker-{docker}"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), text).unwrap();
    };
    let said = refusal(&pull("none", &[]));
    assert!(said.contains("certificate of") && said.contains("ca_file"), "{said}");
    let ca = registry.ca();
    let with_ca: &[(&str, &Path)] = &[("SSL_CERT_FILE", &ca)];
    let said = refusal(&pull("none", with_ca));
    assert!(said.contains("refused access") && said.contains("docker login"), "{said}");
    let entry = |user: &str, password: &str| {
        format!(
            r#"{{"auths":{{"{}":{{"username":"{user}","password":"{password}"}}}}}}"#,
            registry.host()
        )
    };
    login("wrong", &entry(USER, "guessed"));
    let said = refusal(&pull("wrong", with_ca));
    assert!(said.contains("refused access") && !said.contains("guessed"), "{said}");
    login("right", &entry(USER, PASSWORD));
    pulled(&pull("right", with_ca));
    // The same by the configuration, and a helper.
    pulled(&installation.output(&["image", "rm", &name]).unwrap());
    fs::write(home.join("config.toml"), format!("[registry]\nca_file = {ca:?}\n")).unwrap();
    let helpers = home.with_file_name("helpers");
    fs::create_dir_all(&helpers).unwrap();
    let helper = helpers.join("docker-credential-test");
    let text = format!(
        "#!/bin/sh\nread -r server\n[ \"$server\" = {} ] || {{ echo credentials not found; exit 1; }}\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'\n",
        registry.host()
    );
    fs::write(&helper, text).unwrap();
    fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    login("helper", r#"{"credsStore":"test"}"#);
    let path = format!("{}:{}", helpers.display(), std::env::var("PATH").unwrap());
    pulled(&pull("helper", &[("PATH", Path::new(&path))]));
    // Nobody has kept the password.
    for file in
        super::files(home.clone()).into_iter().chain(super::files(installation.cache().into()))
    {
        let bytes = fs::read(&file).unwrap();
        let found = bytes.windows(PASSWORD.len()).any(|part| part == PASSWORD.as_bytes());
        assert!(!found, "{}", file.display());
    }
}
