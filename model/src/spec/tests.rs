use super::*;

fn input() -> VmSpecInput {
    VmSpecInput {
        image: "busybox".into(),
        command: vec![b"true".to_vec()],
        entrypoint: None,
        env: Vec::new(),
        workdir: None,
        user: None,
        hostname: None,
        add_hosts: Vec::new(),
        network: NetworkInput { no_network: true, ..NetworkInput::default() },
        cpus: 1.0,
        memory_mb: 512,
        disk_size_mb: 5120,
        timeout: None,
        graceful_shutdown: None,
        stdin: false,
        terminal: None,
        privileged: false,
        remove: true,
        host_cpus: 2,
    }
}

fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

fn image() -> ImageConfig {
    ImageConfig {
        user: "1000".into(),
        working_dir: "/srv".into(),
        entrypoint: vec!["/entry".into()],
        cmd: vec!["default".into()],
        env: [("A".to_owned(), "image".to_owned())].into(),
        stop_signal: "SIGQUIT".into(),
        ..ImageConfig::default()
    }
}

#[test]
fn out_of_range_numbers_are_refused_by_flag() {
    type Spoil = fn(&mut VmSpecInput);
    let bad: [(&str, Spoil); 9] = [
        ("--cpus", |i| i.cpus = 0.0),
        ("--cpus", |i| i.cpus = -1.0),
        ("--cpus", |i| i.cpus = f64::NAN),
        ("--cpus", |i| i.cpus = f64::INFINITY),
        ("--cpus", |i| i.cpus = 2.5),
        ("--memory", |i| i.memory_mb = 1),
        ("--memory", |i| i.memory_mb = u64::MAX),
        ("--disk-size", |i| i.disk_size_mb = 0),
        ("--timeout", |i| i.timeout = Some(Duration::ZERO)),
    ];
    for (flag, spoil) in bad {
        let mut input = input();
        spoil(&mut input);
        let refusal = VmSpec::check(input).unwrap_err().to_string();
        assert!(refusal.starts_with(flag), "{refusal}");
    }
}

#[test]
fn hostnames_cannot_carry_anything_else() {
    for bad in ["", "a b", "-a", "a-", "a..b", "a\n", "a/b", &"x".repeat(64)] {
        let refused = VmSpec::check(VmSpecInput { hostname: Some(bad.into()), ..input() });
        assert!(refused.is_err(), "{bad:?} was taken");
    }
    for good in ["a", "web-1", "a.b.c", &"x".repeat(63)] {
        let spec = VmSpec::check(VmSpecInput { hostname: Some(good.into()), ..input() }).unwrap();
        assert_eq!(spec.guest_config(VmId::new(1), None).hostname, good);
    }
}

#[test]
fn a_vm_is_called_by_its_id_unless_told_otherwise() {
    let spec = VmSpec::check(input()).unwrap();
    assert_eq!(spec.guest_config(VmId::new(0xabc), None).hostname, "vm-00000abc");
}

#[test]
fn add_hosts_are_split_at_the_first_colon_and_normalised() {
    let parsed = parse_add_host("db:0:0::1").unwrap();
    assert_eq!((parsed.host.as_str(), parsed.ip.to_string().as_str()), ("db", "::1"));
    for bad in ["", "db", ":1.2.3.4", "a b:1.2.3.4", "db:1.2.3", "db:evil\n1.2.3.4"] {
        let refusal = parse_add_host(bad).unwrap_err().to_string();
        assert!(refusal.starts_with("invalid add-host mapping"), "{refusal}");
    }
}

#[test]
fn the_command_is_composed_as_docker_does() {
    let compose = |entrypoint: Option<&str>, command: &[&str]| {
        let input = VmSpecInput {
            entrypoint: entrypoint.map(str::to_owned),
            command: words(command),
            ..input()
        };
        VmSpec::check(input).unwrap().command(&image()).map(|exec| exec.argv)
    };
    assert_eq!(compose(None, &[]).unwrap(), words(&["/entry", "default"]));
    assert_eq!(compose(None, &["x", "y"]).unwrap(), words(&["/entry", "x", "y"]));
    assert_eq!(compose(Some("/mine"), &[]).unwrap(), words(&["/mine"]));
    assert_eq!(compose(Some("/mine"), &["x"]).unwrap(), words(&["/mine", "x"]));
    assert_eq!(compose(Some(""), &["x"]).unwrap(), words(&["x"]));
    let nothing = compose(Some(""), &[]).unwrap_err();
    assert!(
        nothing.to_string().contains("--entrypoint replaces the command of image"),
        "{nothing}"
    );
}

#[test]
fn the_users_wishes_override_the_images() {
    let spec = VmSpec::check(VmSpecInput {
        env: vec![EnvVar { name: "A".into(), value: b"user".to_vec(), secret: false }],
        workdir: Some("/w".into()),
        user: Some("root".into()),
        ..input()
    })
    .unwrap();
    let exec = spec.command(&image()).unwrap();
    assert_eq!(exec.env.last().unwrap(), &(b"A".to_vec(), b"user".to_vec()));
    assert_eq!(exec.cwd.as_deref(), Some("/w"));
    assert_eq!(exec.user.as_deref(), Some("root"));
    let plain = VmSpec::check(input()).unwrap().command(&image()).unwrap();
    assert_eq!(plain.cwd.as_deref(), Some("/srv"));
    assert_eq!(plain.user.as_deref(), Some("1000"));
    assert_eq!(plain.stop_signal, Some(3));
}

#[test]
fn values_from_the_callers_environment_are_not_stored() {
    let lookup = |name: &str| (name == "TOKEN").then(|| b"s3cret".to_vec());
    let env = vec![parse_env("TOKEN", &lookup).unwrap(), parse_env("K=v=w", &lookup).unwrap()];
    assert!(parse_env("UNSET", &lookup).is_err());
    assert!(parse_env("=x", &lookup).is_err());
    let spec = VmSpec::check(VmSpecInput { env, ..input() }).unwrap();
    let stored = spec.redacted_json();
    assert!(!stored.contains("s3cret"), "{stored}");
    assert!(stored.contains("\"TOKEN\"") && stored.contains("\"K\":\"v=w\""), "{stored}");
    assert!(spec.command(&image()).unwrap().env.contains(&(b"TOKEN".to_vec(), b"s3cret".to_vec())));
}

#[test]
fn users_and_directories_have_a_form() {
    for bad in ["", ":", "a:", ":b", "a:b:c", "a b"] {
        assert!(check_user(bad).is_err(), "{bad:?} was taken");
    }
    for good in ["0", "1000:1000", "www-data", "user:staff"] {
        assert!(check_user(good).is_ok(), "{good:?} was refused");
    }
    assert!(check_workdir("work").is_err());
}

#[test]
fn a_command_beyond_a_frame_is_refused() {
    let command = vec![vec![b'x'; MAX_COMMAND_BYTES]];
    let spec = VmSpec::check(VmSpecInput { command, ..input() }).unwrap();
    assert!(matches!(spec.command(&ImageConfig::default()), Err(SpecError::CommandTooLong { .. })));
}

#[test]
fn env_files_skip_comments_and_blanks() {
    let lines: Vec<(usize, &str)> = env_file_lines("# c\n\n  A=1  \n#B=2\nC\n").collect();
    assert_eq!(lines, [(3, "A=1"), (5, "C")]);
}

#[test]
fn a_guest_with_a_network_is_told_its_half_of_the_subnet() {
    let spec = VmSpec::check(VmSpecInput {
        network: NetworkInput { mtu: Some(1200), ..NetworkInput::default() },
        ..input()
    })
    .unwrap();
    let subnet = crate::subnet::SubnetPool::default().lowest_free(&Default::default(), &[]);
    let told = spec.guest_config(VmId::new(7), subnet);
    let expected = GuestNetwork {
        mac: VmId::new(7).mac(),
        address: [192, 168, 100, 2].into(),
        prefix: 24,
        gateway: [192, 168, 100, 1].into(),
        gateway_mac: VmId::new(7).gateway_mac(),
        mtu: 1200,
    };
    assert_eq!(told.network, Some(expected));
    assert_eq!(told.dns_servers, [IpAddr::from([8, 8, 8, 8]), IpAddr::from([8, 8, 4, 4])]);
    let without = VmSpec::check(input()).unwrap().guest_config(VmId::new(7), None);
    assert_eq!((without.network, without.dns_servers), (None, Vec::new()));
}
