//! Missing servers are installed with the package manager of the system, here one that does it in no time.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Records how it was called, and "installs" the programs of the packages that it is asked for.
const APT_GET: &str = r#"#!/bin/sh
echo "$@" >> "$PACKAGES/calls"
for package in "$@"; do
    case "$package" in
        postgresql) programs="postgres initdb" ;;
        redis-server | nats-server | pgbouncer) programs="$package" ;;
        *) programs="" ;;
    esac
    for program in $programs; do
        [ "$program" = "$REFUSED" ] && continue
        printf '#!/bin/sh\n' > "$PACKAGES/$program"
        chmod +x "$PACKAGES/$program"
    done
done
"#;

/// A folder that is all there is on PATH, beside the shell.
fn system(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    drop(std::fs::remove_dir_all(&folder));
    std::fs::create_dir_all(&folder).unwrap();
    for program in ["sh", "env", "chmod", "id"] {
        let place = ["/bin", "/usr/bin"].map(|folder| Path::new(folder).join(program));
        let real = place.iter().find(|path| path.exists()).unwrap();
        std::os::unix::fs::symlink(real, folder.join(program)).unwrap();
    }
    program(&folder, "apt-get", APT_GET);
    // Without the administrator's rights the commands are run by sudo.
    program(&folder, "sudo", "#!/bin/sh\n[ \"$1\" = -n ] && exit 0\nexec \"$@\"\n");
    folder
}

fn program(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn install(folder: &Path, refused: &str) -> Output {
    let tests = std::env::current_exe().unwrap();
    // target/<profile>/deps/<test>; examples are built with the tests.
    let program = tests.ancestors().nth(2).unwrap().join("examples/install");
    let mut command = Command::new(program);
    command.env_clear().env("PATH", folder).env("PACKAGES", folder).env("REFUSED", refused);
    command.env("DEVSTACK_SEARCH", "path").output().unwrap()
}

#[test]
fn what_is_missing_is_installed_and_said_first() {
    let folder = system("install-all");
    let output = install(&folder, "");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("some servers are missing, running: "), "{said}");
    let calls = std::fs::read_to_string(folder.join("calls")).unwrap();
    assert!(calls.contains("update\n"), "{calls}");
    assert!(calls.contains("postgresql nats-server redis-server pgbouncer"), "{calls}");

    // Everything is there now, so nothing is run.
    std::fs::remove_file(folder.join("calls")).unwrap();
    assert!(install(&folder, "").status.success());
    assert!(!folder.join("calls").exists());
}

#[test]
fn what_the_package_manager_does_not_bring_is_named() {
    let folder = system("install-some");
    let output = install(&folder, "nats-server");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("install by hand: nats-server (then set DEVSTACK_NATS_SERVER)"), "{said}");
}
