//! Goal: the API does what its description says, and says no in its own words. Method: requests through the real router, the
//! description as the list of what to ask.

#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

mod daemon_rig;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use blktapd::http::{Api, control_router, metrics_router, openapi};
use blktapd::metrics::Metrics;
use daemon_rig::Rig;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

fn routers(rig: &Rig) -> (Router, Router) {
    let api = Api { daemon: rig.daemon.clone(), metrics: Arc::new(Metrics::new().unwrap()) };
    (control_router(api.clone()), metrics_router(api))
}

async fn send(
    router: &Router,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> (StatusCode, header::HeaderMap, String) {
    let mut request = Request::builder().method(method).uri(path);
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let body = body.map_or_else(Body::empty, |text| Body::from(text.to_owned()));
    let response = router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    (parts.status, parts.headers, text)
}

async fn ask(router: &Router, method: &str, path: &str, body: Option<Value>) -> (StatusCode, Value) {
    let body = body.map(|body| body.to_string());
    let (status, _, text) = send(router, method, path, body.as_deref()).await;
    (status, if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
}

#[tokio::test]
async fn a_disk_lives_through_the_api() {
    let rig = Rig::new();
    let (router, _) = routers(&rig);
    let body =
        json!({"image": {"type": "null", "options": {"size": "1G"}}, "nbd": true, "limits": {"iops": "2k"}});
    let (status, disk) = ask(&router, "PUT", "/v1/disks/d1?timeout_s=60", Some(body.clone())).await;
    assert_eq!((status, &disk["limits"]["iops"]), (StatusCode::CREATED, &json!(2000)), "{disk}");
    assert_eq!(ask(&router, "PUT", "/v1/disks/d1", Some(body)).await.0, StatusCode::OK);
    let other = json!({"image": "null:?size=2G", "nbd": true});
    let (status, problem) = ask(&router, "PUT", "/v1/disks/d1", Some(other)).await;
    assert_eq!((status, &problem["kind"]), (StatusCode::CONFLICT, &json!("conflict")));
    let (_, disks) = ask(&router, "GET", "/v1/disks", None).await;
    assert_eq!(disks.as_array().unwrap().len(), 1);
    let (status, disk) =
        ask(&router, "PATCH", "/v1/disks/d1/qos", Some(json!({"limits": {"iops": 0}}))).await;
    assert_eq!((status, &disk["limits"]), (StatusCode::OK, &json!({})));
    assert_eq!(ask(&router, "POST", "/v1/disks/d1/pause", None).await.1["state"], "paused");
    assert_eq!(ask(&router, "POST", "/v1/disks/d1/resume", Some(json!({}))).await.1["state"], "running");
    assert_eq!(ask(&router, "GET", "/v1/disks/d1/stats", None).await.1["ops"]["read"]["completed"], 0);
    let (status, group) = ask(&router, "PATCH", "/v1/groups/g1", Some(json!({"bps": "1M"}))).await;
    assert_eq!((status, &group["limits"]["bps"]), (StatusCode::OK, &json!(1 << 20)));
    assert_eq!(ask(&router, "DELETE", "/v1/groups/g1", None).await.0, StatusCode::NO_CONTENT);
    let (_, events) = ask(&router, "GET", "/v1/events?limit=2", None).await;
    assert_eq!(events.as_array().unwrap().len(), 2);
    assert_eq!(ask(&router, "DELETE", "/v1/disks/d1", None).await, (StatusCode::OK, Value::Null));
    assert_eq!(ask(&router, "GET", "/v1/disks/d1", None).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn every_documented_operation_exists_and_every_answer_is_documented() {
    let rig = Rig::new();
    let (router, _) = routers(&rig);
    let document = serde_json::to_value(openapi()).unwrap();
    let mut asked = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let concrete = path.replace("{name}", "nobody");
            let body = operation.get("requestBody").map(|_| json!({}));
            let (status, _, text) = send(
                &router,
                &method.to_uppercase(),
                &concrete,
                body.map(|body| body.to_string()).as_deref(),
            )
            .await;
            asked += 1;
            let documented = &operation["responses"][status.as_str()];
            assert!(
                documented.is_object(),
                "{method} {path} answered {status}, which is not documented: {text}"
            );
            assert!(
                !text.contains("there is nothing at") && status != StatusCode::METHOD_NOT_ALLOWED,
                "{method} {path}"
            );
        }
    }
    assert!(asked >= 20, "{asked}");
    for reference in document.to_string().split("#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"][name].is_object(), "{name} is referred to and missing");
    }
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let rig = Rig::new();
    let (router, _) = routers(&rig);
    let put = |body: &'static str| send(&router, "PUT", "/v1/disks/d", Some(body));
    let cases = [
        ("{", 400, "EOF"),
        ("{\"nbd\": true}", 400, "missing field `image`"),
        ("{\"image\": \"null:?size=1M\", \"nbd\": true, \"colour\": 1}", 400, "unknown field `colour`"),
        ("{\"image\": 7, \"nbd\": true}", 400, "expected an image"),
        ("{\"image\": {\"type\": \"qcow9\"}, \"nbd\": true}", 400, "neither a type nor a decorator"),
        (
            "{\"image\": \"null:?size=1M\", \"nbd\": true, \"limits\": {\"iops\": \"x\"}}",
            400,
            "a number of operations",
        ),
        (
            "{\"image\": \"null:?size=1M\", \"nbd\": true, \"limits\": {\"bps_read_one_time_burst\": \"1M\"}}",
            422,
            "a burst of bps_read is given, and no rate",
        ),
        ("{\"image\": \"null:?size=1M\"}", 422, "the frontends are"),
        ("{\"image\": \"null:?size=7\", \"nbd\": true}", 422, "multiple of 512"),
        ("{\"image\": \"raw:/no/such.img\", \"nbd\": true}", 422, "/no/such.img"),
    ];
    for (body, expected_status, expected) in cases {
        let (status, headers, text) = put(body).await;
        assert_eq!(status.as_u16(), expected_status, "{body}: {text}");
        assert_eq!(headers[header::CONTENT_TYPE], "application/json");
        assert!(
            serde_json::from_str::<Value>(&text).unwrap()["message"].as_str().unwrap().contains(expected),
            "{text}"
        );
    }
    // A limit of 0 is no rate either.
    for (path, body) in [
        ("/v1/disks/other/qos", "{\"limits\": {\"iops\": 0, \"iops_burst\": 5}}"),
        ("/v1/groups/g", "{\"iops_one_time_burst\": 5}"),
    ] {
        if path.contains("disks") {
            rig.attach("other", "null:?size=1M").await.unwrap();
        }
        let (status, _, text) = send(&router, "PATCH", path, Some(body)).await;
        assert!(
            status.as_u16() == 422 && text.contains("a burst of iops is given, and no rate"),
            "{status} {text}"
        );
    }
    assert_eq!(rig.daemon.describe_group("g").unwrap_err().exit_code(), 3, "nothing is made of it");
    rig.daemon.detach("other", false, daemon_rig::patient()).await.unwrap();
    let big = "x".repeat(70_000);
    assert_eq!(send(&router, "PUT", "/v1/disks/d", Some(&big)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let no_type = Request::builder().method(Method::PUT).uri("/v1/disks/d").body(Body::from("{}")).unwrap();
    let answer = router.clone().oneshot(no_type).await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    for query in ["timeout_s=601", "timeout_s=x", "timeout=5"] {
        let (status, _, text) = send(&router, "DELETE", &format!("/v1/disks/d?{query}"), None).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{query}: {text}");
    }
    let (status, headers, text) = send(&router, "POST", "/v1/disks", Some("{}")).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{text}");
    assert!(headers[header::ALLOW].to_str().unwrap().contains("GET"));
    let (status, _, text) = send(&router, "GET", "/v2/nothing", None).await;
    assert!(status == StatusCode::NOT_FOUND && text.contains("/v1/openapi.json"), "{text}");
    assert!(rig.daemon.all_disks().is_empty());
}

#[tokio::test]
async fn a_scrape_has_every_disk_and_passes_promtool() {
    let rig = Rig::new();
    let (_, router) = routers(&rig);
    rig.attach("d1", "null:?size=1G").await.unwrap();
    rig.attach("d2", "ram:r?size=1M").await.unwrap();
    let counters = rig.daemon.find("d1").unwrap().counters.clone();
    let read = &counters.ops[0];
    read.completed.add(3);
    read.bytes.add(3 * 4096);
    for ns in [40_000, 3_000_000, 20_000_000_000] {
        read.service.record(ns);
        read.queue.record(1_000);
    }
    let (status, headers, text) = send(&router, "GET", "/metrics", None).await;
    assert_eq!(
        (status, &headers[header::CONTENT_TYPE]),
        (StatusCode::OK, &"text/plain; version=0.0.4; charset=utf-8".parse().unwrap())
    );
    for line in [
        "blktapd_disk_reads_completed_total{disk=\"d1\"} 3",
        "blktapd_disk_read_bytes_total{disk=\"d1\"} 12288",
        "blktapd_disk_reads_completed_total{disk=\"d2\"} 0",
        "blktapd_disk_request_duration_seconds_bucket{disk=\"d1\",op=\"read\",le=\"0.00005\"} 1",
        "blktapd_disk_request_duration_seconds_bucket{disk=\"d1\",op=\"read\",le=\"10\"} 2",
        "blktapd_disk_request_duration_seconds_bucket{disk=\"d1\",op=\"read\",le=\"+Inf\"} 3",
        "blktapd_disk_request_duration_seconds_count{disk=\"d1\",op=\"read\"} 3",
        "blktapd_disk_size_bytes{disk=\"d1\"} 1073741824",
        "blktapd_disk_state{disk=\"d1\",state=\"running\"} 1",
        "blktapd_disk_up{disk=\"d1\"} 1",
        "blktapd_shard_up{shard=\"0\"} 1",
        "blktapd_disks 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
    assert!(!text.contains("op=\"flush\",le"), "an operation that never came has no histogram");
    assert!(text.contains("process_cpu_seconds_total") && text.contains("blktapd_build_info{version="));
    promtool(&text);
    assert_eq!(send(&router, "GET", "/healthz", None).await.0, StatusCode::OK);
    assert_eq!(
        send(&router, "GET", "/v1/disks", None).await.0,
        StatusCode::NOT_FOUND,
        "the metrics listener has no control"
    );
}

/// `promtool check metrics`, where there is one (in PATH, or named by PROMTOOL).
fn promtool(text: &str) {
    use std::io::Write;
    let program = std::env::var("PROMTOOL").unwrap_or_else(|_| "promtool".into());
    let child = std::process::Command::new(&program)
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: {program} is not there (Debian: package prometheus)");
        return;
    };
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
