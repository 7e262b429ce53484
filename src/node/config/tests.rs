//! Settings from everywhere, right and wrong.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;

fn config(vars: &[(&str, &str)]) -> Result<NodeConfig, ConfigError> {
    let vars: Vec<_> = vars.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    NodeConfig::load(&move |name| vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.into()))
}

#[test]
fn home_says_where_things_are_unless_told_otherwise() {
    let plain = config(&[("HOME", "/h")]).unwrap();
    assert_eq!(plain.home, PathBuf::from("/h/.matchlock"));
    assert_eq!(plain.cache, PathBuf::from("/h/.cache/matchlock"));
    assert_eq!((plain.boot_timeout, plain.history_days), (None, 30));
    let told = config(&[("MATCHLOCK_HOME", "/s"), ("MATCHLOCK_CACHE", "/c")]).unwrap();
    assert_eq!((told.home, told.cache), ("/s".into(), "/c".into()));
}

#[test]
fn the_file_says_more_and_the_environment_has_the_last_word() {
    let home = tempfile::tempdir().unwrap();
    let text = "cache = '/c'\nkernel = '/k'\nboot_timeout = 7\nhang_timeout = 9\nhistory_days = 3\n\
                subnet_pool = 'base=10.9.0.0/16,size=30'\nvm_log_size_mb = 2\nvm_log_files = 5\nauto_warm = false\n";
    std::fs::write(home.path().join(CONFIG_FILE), text).unwrap();
    let home = home.path().to_str().unwrap();
    let told = config(&[("MATCHLOCK_HOME", home)]).unwrap();
    assert_eq!((told.cache, told.kernel), ("/c".into(), Some("/k".into())));
    assert_eq!((told.boot_timeout, told.history_days), (Some(Duration::from_secs(7)), 3));
    assert_eq!(told.hang_timeout, Some(Duration::from_secs(9)));
    assert_eq!(told.subnet_pool, Ok("base=10.9.0.0/16,size=30".parse().unwrap()));
    assert!(!told.auto_warm && config(&[("HOME", "/h")]).unwrap().auto_warm);
    assert_eq!(told.vm_log, LogLimits { file_bytes: 2 << 20, files: 5 });
    let overruled = config(&[
        ("MATCHLOCK_HOME", home),
        ("MATCHLOCK_CACHE", "/d"),
        ("MATCHLOCK_KERNEL", "/l"),
        ("MATCHLOCK_BOOT_TIMEOUT", "8"),
        ("MATCHLOCK_HANG_TIMEOUT", "8"),
        ("MATCHLOCK_HISTORY_DAYS", "0"),
        ("MATCHLOCK_SUBNET_POOL", "base=10.8.0.0/16,size=29"),
        ("MATCHLOCK_VM_LOG_SIZE_MB", "1"),
        ("MATCHLOCK_VM_LOG_FILES", "0"),
        ("MATCHLOCK_AUTO_WARM", "1"),
    ])
    .unwrap();
    assert_eq!((overruled.cache, overruled.kernel), ("/d".into(), Some("/l".into())));
    let eight = Some(Duration::from_secs(8));
    assert_eq!((overruled.boot_timeout, overruled.history_days), (eight, 0));
    assert_eq!(overruled.hang_timeout, eight);
    assert_eq!(overruled.subnet_pool, Ok("base=10.8.0.0/16,size=29".parse().unwrap()));
    assert!(overruled.auto_warm);
    assert_eq!(overruled.vm_log, LogLimits { file_bytes: 1 << 20, files: 0 });
}

#[test]
fn wrong_values_are_refused_by_name() {
    assert!(matches!(config(&[]), Err(ConfigError::NoHome { .. })));
    for (name, value) in [
        ("MATCHLOCK_HOME", "x"),
        ("MATCHLOCK_CACHE", "x"),
        ("MATCHLOCK_BOOT_TIMEOUT", "0"),
        ("MATCHLOCK_BOOT_TIMEOUT", "1.5"),
        ("MATCHLOCK_HANG_TIMEOUT", "0"),
        ("MATCHLOCK_HISTORY_DAYS", "-1"),
        ("MATCHLOCK_HISTORY_DAYS", "month"),
        ("MATCHLOCK_VM_LOG_SIZE_MB", "0"),
        ("MATCHLOCK_VM_LOG_FILES", "101"),
        ("MATCHLOCK_AUTO_WARM", "true"),
    ] {
        let text = config(&[("HOME", "/h"), (name, value)]).unwrap_err().to_string();
        assert!(text.contains(name) && text.contains(value), "{text}");
    }
}

#[test]
fn a_wrong_pool_is_told_to_whoever_needs_it_and_to_nobody_else() {
    for (pool, named) in [("10.0.0.0/8", "10.0.0.0/8"), ("base=10.0.0.0/8,size=31", "31")] {
        let told = config(&[("HOME", "/h"), ("MATCHLOCK_SUBNET_POOL", pool)]).unwrap();
        let text = told.subnet_pool.unwrap_err().to_string();
        assert!(text.contains("MATCHLOCK_SUBNET_POOL") && text.contains(named), "{text}");
    }
    let home = tempfile::tempdir().unwrap();
    let text = "subnet_pool = 'base=10.0.0.0/8'\n";
    std::fs::write(home.path().join(CONFIG_FILE), text).unwrap();
    let vars = [("HOME", "/h"), ("MATCHLOCK_HOME", home.path().to_str().unwrap())];
    let text = config(&vars).unwrap().subnet_pool.unwrap_err().to_string();
    assert!(text.starts_with("subnet_pool in "), "{text}");
}

#[test]
fn what_is_wrong_in_the_file_is_told_with_its_place() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(CONFIG_FILE);
    for (text, wanted) in [
        ("# days\nhistroy_days = 3\n", "config.toml, line 2: unknown field `histroy_days`"),
        ("history_days = 'x'", "line 1: write a whole number, without quotes, not this string"),
        ("history_days = -3", "line 1: write a whole number, without quotes, not -3"),
        ("boot_timeout = 1.5", "line 1: write a whole number, without quotes, not this float"),
        ("\ncache = 7", "line 2: write a text in quotes, not 7"),
        ("subnet_pool = ['x']", "line 1: write a text in quotes, not this array"),
        ("history_days = 4294967296", "history_days in "),
        ("boot_timeout = 0", "boot_timeout in "),
        ("cache = 'relative'", "cache in "),
        ("vm_log_files = 101", "vm_log_files in "),
        ("vm_log_size_mb = -1", "line 1"),
        ("auto_warm = 1", "line 1: write true or false, without quotes, not 1"),
        ("a b", "line 1"),
    ] {
        std::fs::write(&file, text).unwrap();
        let vars = [("HOME", "/h"), ("MATCHLOCK_HOME", home.path().to_str().unwrap())];
        let told = config(&vars).unwrap_err().to_string();
        assert!(told.contains(wanted) && !told.contains('\n'), "{text:?}: {told}");
    }
}

#[test]
fn a_file_that_cannot_be_trusted_is_refused_and_nothing_is_waited_for() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(CONFIG_FILE);
    let vars = [("HOME", "/h"), ("MATCHLOCK_HOME", home.path().to_str().unwrap())];
    type Make = fn(&Path);
    let cases: [(&str, Make); 6] = [
        ("not a regular file", |path| std::fs::create_dir(path).unwrap()),
        ("not a regular file", |path| {
            rustix::fs::mkfifoat(rustix::fs::CWD, path, Mode::RWXU).unwrap();
        }),
        ("not a regular file", |path| symlink("/dev/zero", path).unwrap()),
        ("No such file", |path| symlink("/nowhere", path).unwrap()),
        ("valid UTF-8", |path| std::fs::write(path, b"kernel = '\xff'").unwrap()),
        ("others can write", |path| {
            std::fs::write(path, "").unwrap();
            std::fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
        }),
    ];
    for (wanted, make) in cases {
        make(&file);
        let refused = config(&vars).unwrap_err();
        let told = matchlock_model::failure::chain(&refused);
        assert!(told.contains(wanted) && told.contains("config.toml"), "{told}");
        if file.is_dir() && !file.is_symlink() {
            std::fs::remove_dir(&file).unwrap();
        } else {
            std::fs::remove_file(&file).unwrap();
        }
    }
}

#[test]
fn what_an_image_may_take_is_said_in_the_file() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(CONFIG_FILE);
    let read = |text: &str| {
        std::fs::write(&file, text).unwrap();
        config(&[("HOME", "/h"), ("MATCHLOCK_HOME", home.path().to_str().unwrap())])
    };
    let limits = read("[image]\nmax_size_mb = 3\nmax_files = 7\n").unwrap().image_limits;
    let default = ImportLimits::default();
    let expected = ImportLimits { max_bytes: 3 << 20, max_entries: 7, ..default };
    assert_eq!(limits, expected);
    let limits = read("[image]\nmax_build_memory_mb = 9\n").unwrap().image_limits;
    assert_eq!(limits, ImportLimits { max_build_memory: 9 << 20, ..default });
    let error = read("[image]\nmax_files = 0\n").unwrap_err().to_string();
    assert!(error.contains("max_files in [image] in "), "{error}");
    assert!(read("[image]\nmax_file = 1\n").is_err());
}

#[test]
fn registries_are_named_in_the_file() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().to_str().unwrap();
    let load = |text: &str| {
        std::fs::write(home.path().join(CONFIG_FILE), text).unwrap();
        config(&[("MATCHLOCK_HOME", path), ("HOME", "/h")]).map_err(|error| error.to_string())
    };
    let told = load(
        "[registry]\ninsecure = ['localhost:5000']\nca_file = '/ca.pem'\n\
         [registry.mirrors]\n'docker.io' = ['m.example', 'n.example:5']\n",
    );
    let told = told.unwrap().registries;
    assert_eq!(told.insecure, ["localhost:5000"]);
    assert_eq!(told.mirrors["docker.io"], ["m.example", "n.example:5"]);
    assert_eq!(told.ca_file, Some("/ca.pem".into()));
    assert_eq!(told.docker_config, Some("/h/.docker".into()));
    for (text, wanted) in [
        ("[registry]\ninsecure = ['http://localhost']", "without a scheme"),
        ("[registry]\ninsecure = ['']", "without a scheme"),
        ("[registry.mirrors]\n'docker.io' = ['m/path']", "mirrors in [registry]"),
        ("[registry]\nca_file = 'ca.pem'", "use an absolute path"),
        ("[registry]\nsecure = true", "secure"),
    ] {
        let error = load(text).unwrap_err();
        assert!(error.contains(wanted) && error.contains(CONFIG_FILE), "{error}");
    }
}
