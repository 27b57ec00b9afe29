//! HTTP/2 requests that HTTP/1.1 would read otherwise (E5): each is refused, and nothing of it reaches the upstream.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use mesh_testkit::h2_raw::{Fate, Http2};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::upstream::Recorder;

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");

type Field = (Vec<u8>, Vec<u8>);

fn gateway(upstream: &Recorder) -> (Process, ConfigDir) {
    let dir = ConfigDir::new();
    dir.write(
        "mesh.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge}}\nspec: {{servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['*']}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: edge}}\nspec: {{hosts: ['*'], gateways: [edge], http: [{{route: [{{destination: {{host: app.example}}}}]}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app}}\nspec:\n  hosts: [app.example]\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: {}, ports: {{http: {}}}}}]\n",
            upstream.addr.ip(),
            upstream.addr.port()
        ),
    );
    let config = dir.file("mesh.yaml");
    let process = Process::start(
        GATEWAY,
        &[
            "--config",
            &config,
            "--bind",
            "127.0.0.1",
            "--map-port",
            "80=0",
            "--admin",
            "127.0.0.1:0",
            "--log",
            "error",
        ],
    );
    (process, dir)
}

fn field(name: &str, value: &str) -> Field {
    (name.as_bytes().to_vec(), value.as_bytes().to_vec())
}

/// A sound request, in which a field is replaced or to which one is added.
fn with(name: &str, value: &str) -> Vec<Field> {
    let mut fields = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/x")]
        .map(|(n, v)| field(n, v))
        .to_vec();
    match fields.iter_mut().find(|(known, _)| known == name.as_bytes()) {
        Some((_, known)) => *known = value.as_bytes().to_vec(),
        None => fields.push(field(name, value)),
    }
    fields
}

fn without(name: &str) -> Vec<Field> {
    let mut fields = with("x", "y");
    fields.retain(|(known, _)| known != name.as_bytes());
    fields
}

/// A name, the head, and what is sent after it.
type Case = (String, Vec<Field>, Option<&'static [u8]>);

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    // Bytes that end a line, a name or a token where HTTP/1.1 writes the value.
    for (name, bytes) in [
        ("CR", "\r"),
        ("LF", "\n"),
        ("CRLF and a header", "\r\nx-smuggled: 1"),
        ("CRLF and a request", "\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("NUL", "\0"),
    ] {
        for at in ["x-value", ":path", ":authority", ":method", ":scheme", "host", "cookie"] {
            let sound = match at {
                ":path" => "/x",
                ":method" => "GET",
                ":scheme" => "http",
                _ => "a",
            };
            cases.push((format!("{name} in {at}"), with(at, &format!("{sound}{bytes}b")), None));
        }
        cases.push((format!("{name} in a name"), with(&format!("x{bytes}y"), "1"), None));
    }
    for (name, fields) in [
        ("space in a name", with("x y", "1")),
        ("colon in a name", with("x:y", "1")),
        ("empty name", with("", "1")),
        ("upper case in a name", with("X-Upper", "1")),
        ("upper case in host", with("Host", "b")),
        ("space in :path", with(":path", "/x HTTP/1.1")),
        ("space in :authority", with(":authority", "a b")),
        ("space in :method", with(":method", "GET /y")),
        ("tab in :path", with(":path", "/x\ty")),
        ("empty :path", with(":path", "")),
        (":path without a slash", with(":path", "x")),
        (":path with a raw byte", with(":path", "/\u{e9}")),
        (":path with an encoded NUL", with(":path", "/x%00y")),
        ("* for another method than OPTIONS", with(":path", "*")),
        ("empty :method", with(":method", "")),
        ("lower case :method", with(":method", "get")),
        ("userinfo in :authority", with(":authority", "u@a")),
        ("path in :authority", with(":authority", "a/b")),
        ("no :path", without(":path")),
        ("no :method", without(":method")),
        ("no :scheme", without(":scheme")),
        ("no :authority and no host", without(":authority")),
        ("unknown pseudo-header", with(":unknown", "1")),
        (":status in a request", with(":status", "200")),
        ("transfer-encoding", with("transfer-encoding", "chunked")),
        ("connection", with("connection", "close")),
        ("connection that names a header", with("connection", "x-value")),
        ("keep-alive", with("keep-alive", "timeout=5")),
        ("proxy-connection", with("proxy-connection", "keep-alive")),
        ("upgrade", with("upgrade", "websocket")),
        ("te", with("te", "gzip")),
        ("content-length that is no number", with("content-length", "x")),
        ("content-length with a sign", with("content-length", "+0")),
        ("content-length list", with("content-length", "0, 0")),
        ("content-length without data", with("content-length", "5")),
        ("CONNECT", with(":method", "CONNECT")),
        ("header with an underscore at the edge", with("x_under", "1")),
    ] {
        cases.push((name.to_owned(), fields, None));
    }
    for (name, doubled, value) in [
        ("two :path", ":path", "/y"),
        ("two :method", ":method", "POST"),
        ("two :authority", ":authority", "b"),
        ("two :scheme", ":scheme", "https"),
    ] {
        let mut fields = with("x", "y");
        fields.insert(0, field(doubled, value));
        cases.push((name.to_owned(), fields, None));
    }
    let mut after = with("x", "y");
    after.rotate_right(1);
    cases.push(("pseudo-headers after another".to_owned(), after, None));
    let mut lengths = with("content-length", "3");
    lengths.push(field("content-length", "5"));
    cases.push(("two content-lengths".to_owned(), lengths, Some(b"abc")));
    cases.push(("more data than content-length".to_owned(), with("content-length", "2"), Some(b"abcdef")));
    cases.push(("less data than content-length".to_owned(), with("content-length", "9"), Some(b"abc")));
    cases
}

#[tokio::test]
async fn e5_a_downgrade_carries_nothing_that_http1_would_read_otherwise() {
    let upstream = Recorder::start(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false).await;
    let (gateway, _dir) = gateway(&upstream);
    let address = gateway.address("http");
    let send = async |fields: &[Field], data: Option<&[u8]>| {
        let mut connection = Http2::connect(address).await;
        let fields: Vec<(&[u8], &[u8])> = fields.iter().map(|(n, v)| (n.as_slice(), v.as_slice())).collect();
        connection.headers(1, &fields, data.is_none()).await;
        if let Some(data) = data {
            connection.data(1, data, true).await;
        }
        connection.fate(1).await
    };
    // That the table refuses for what it says, and not for how it is sent.
    assert_eq!(send(&with("x-sound", "1"), None).await, Fate::Status(200));
    assert_eq!(send(&with("content-length", "3"), Some(b"abc")).await, Fate::Status(200));
    assert_eq!(upstream.requests(), 2);
    upstream.clear();

    let (mut passed, mut refused) = (Vec::new(), [0; 4]);
    let cases = cases();
    for (name, fields, data) in &cases {
        let fate = send(fields, *data).await;
        match fate {
            Fate::Status(400..=599) => refused[0] += 1,
            Fate::Reset(_) => refused[1] += 1,
            Fate::GoAway(_) => refused[2] += 1,
            Fate::Closed => refused[3] += 1,
            Fate::Status(_) => passed.push(format!("{name}: {fate:?}")),
        }
        let seen = upstream.connections().concat();
        if upstream.requests() > 0 || seen.windows(8).any(|bytes| bytes == b"smuggled") {
            passed.push(format!("{name}: upstream saw {}", seen.escape_ascii()));
        }
        upstream.clear();
    }
    println!("e5: {} cases: {refused:?} refused by status, reset, GOAWAY, close", cases.len());
    assert!(passed.is_empty(), "{passed:#?}");
    assert!(cases.len() >= 60);
}

#[tokio::test]
async fn e5_authority_counts_and_host_does_not() {
    let upstream = Recorder::start(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false).await;
    let (gateway, _dir) = gateway(&upstream);
    let mut connection = Http2::connect(gateway.address("http")).await;
    let fields: Vec<(&[u8], &[u8])> = vec![
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b"real.example"),
        (b":path", b"/x"),
        (b"host", b"forged.example"),
    ];
    connection.headers(1, &fields, true).await;
    assert_eq!(connection.fate(1).await, Fate::Status(200));
    let sent = String::from_utf8_lossy(&upstream.connections().concat()).to_ascii_lowercase();
    assert!(sent.contains("host: real.example\r\n") && !sent.contains("forged"), "{sent}");
}

#[tokio::test]
async fn e5_a_fragment_is_neither_routed_nor_forwarded() {
    let upstream = Recorder::start(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false).await;
    let (gateway, _dir) = gateway(&upstream);
    let mut connection = Http2::connect(gateway.address("http")).await;
    let fields: Vec<(&[u8], &[u8])> =
        vec![(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/x?q#y")];
    connection.headers(1, &fields, true).await;
    assert_eq!(connection.fate(1).await, Fate::Status(200));
    let sent = String::from_utf8_lossy(&upstream.connections().concat()).into_owned();
    assert!(sent.starts_with("GET /x?q HTTP/1.1\r\n"), "{sent}");
}
