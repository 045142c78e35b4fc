//! Goal: the description of the API is true: every request that it allows is understood, every other refused, every answer as
//! described. Method: schemathesis (from PyPI) makes requests from the description and judges the answers. Skipped where
//! it is not installed: `SCHEMATHESIS` names the program, else it is looked for in PATH.

#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

mod daemon_rig;

use std::process::Stdio;
use std::sync::Arc;

use blktapd::http::{Api, control_router};
use blktapd::metrics::Metrics;
use daemon_rig::Rig;
use tokio::net::TcpListener;

#[tokio::test]
async fn schemathesis_finds_nothing() {
    let program = std::env::var("SCHEMATHESIS").unwrap_or_else(|_| "schemathesis".into());
    let found = std::process::Command::new(&program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        println!("skipped: {program} is not there (pip install schemathesis)");
        return;
    }
    let rig = Rig::new();
    let api = Api { daemon: rig.daemon.clone(), metrics: Arc::new(Metrics::new().unwrap()) };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, control_router(api)).await });
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/schemathesis.toml");
    let dir = rig.dir.path().to_owned();
    // Off this thread, which serves meanwhile.
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new(program)
            .current_dir(dir)
            .args(["--config-file", config, "run", &format!("{url}/v1/openapi.json"), "--url", &url])
            .args([
                "--checks",
                "all",
                "--phases",
                "examples,coverage,fuzzing,stateful",
                "-n",
                "50",
                "--seed",
                "1",
            ])
            .output()
            .unwrap()
    })
    .await
    .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("25/25"), "every operation was asked\n{text}");
    server.abort();
}
