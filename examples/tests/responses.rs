//! Upstreams that break the protocol, through the sidecar: what their clients get is one answer for each request, whole
//! and their own, or an error (A8).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::get_json;
use mesh_testkit::until;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";

/// What nobody asked for: whoever takes it for an answer has lost his place.
const POISON: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison";

/// What a client may see of a broken answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// 502, and the connection to the upstream is closed.
    Refused,
    /// This status and body, by the framing that wins, or by the method and status that have none.
    Status(u16, &'static str),
    /// The end of the connection, before that of the answer.
    Cut,
}

struct Case {
    name: &'static str,
    method: &'static str,
    answer: String,
    seen: Seen,
    /// Whether the upstream closes after it.
    closes: bool,
}

fn cases() -> Vec<Case> {
    let case = |name, method, answer: &str, seen| Case {
        name,
        method,
        answer: format!("{answer}{POISON}"),
        seen,
        closes: false,
    };
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(1000);
    let mut all = vec![
        case("garbage", "GET", "HTTP/1.1 2OO OK\r\n\r\n", Seen::Refused),
        case("no status line", "GET", "\0\0\0\x07SSH-2.0\r\n\r\n", Seen::Refused),
        case("HTTP/3.0", "GET", "HTTP/3.0 200 OK\r\ncontent-length: 2\r\n\r\nok", Seen::Refused),
        case(
            "two lengths",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nokk",
            Seen::Refused,
        ),
        case("a list of lengths", "GET", "HTTP/1.1 200 OK\r\ncontent-length: 2, 3\r\n\r\nokk", Seen::Refused),
        case("no number", "GET", "HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok", Seen::Refused),
        case(
            "obsolete fold",
            "GET",
            "HTTP/1.1 200 OK\r\nx-a: 1\r\n 2\r\ncontent-length: 2\r\n\r\nok",
            Seen::Refused,
        ),
        case(
            "the same length twice",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",
            Seen::Status(200, "ok"),
        ),
        case(
            "more than its length",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            Seen::Status(200, "ok"),
        ),
        case(
            "length below chunks",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            Seen::Status(200, "hello"),
        ),
        case(
            "length above chunks",
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 50\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            Seen::Status(200, "hello"),
        ),
        case(
            "broken chunk",
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloXX\r\n0\r\n\r\n",
            Seen::Cut,
        ),
        case(
            "negative chunk",
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
            Seen::Cut,
        ),
        case(
            "1,000 interim answers",
            "GET",
            &format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
            Seen::Status(200, "ok"),
        ),
        case(
            "204 with a body",
            "GET",
            "HTTP/1.1 204 No Content\r\ncontent-length: 4\r\n\r\nbody",
            Seen::Status(204, ""),
        ),
        case(
            "304 with a body",
            "GET",
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 4\r\n\r\nbody",
            Seen::Status(304, ""),
        ),
        case(
            "304 with chunks",
            "GET",
            "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
            Seen::Status(304, ""),
        ),
        case(
            "HEAD with a body",
            "HEAD",
            "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody",
            Seen::Status(200, ""),
        ),
        case(
            "unasked 101",
            "GET",
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
            Seen::Refused,
        ),
    ];
    all.push(Case {
        name: "less than its length",
        method: "GET",
        answer: "HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nok".to_owned(),
        seen: Seen::Cut,
        closes: true,
    });
    all.push(Case {
        name: "chunks without an end",
        method: "GET",
        answer: "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n".to_owned(),
        seen: Seen::Cut,
        closes: true,
    });
    all.push(Case {
        name: "nothing at all",
        method: "GET",
        answer: String::new(),
        seen: Seen::Status(
            503,
            "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
        ),
        closes: true,
    });
    all
}

/// `/bad/N/…` is answered by case N, everything else by its path. Says which connections are open.
async fn upstream(cases: Arc<Vec<Case>>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let open = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&open);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (cases, open) = (Arc::clone(&cases), Arc::clone(&counted));
            open.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                serve(stream, &cases).await;
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (addr, open)
}

async fn serve(stream: TcpStream, cases: &[Case]) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let path = head.split(' ').nth(1).unwrap_or_default();
        let bad = path.strip_prefix("/bad/").and_then(|rest| rest.split('/').next()?.parse::<usize>().ok());
        let (answer, closes) = match bad {
            Some(at) => (cases[at].answer.clone(), cases[at].closes),
            None => (format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{path}", path.len()), false),
        };
        if stream.write_all(answer.as_bytes()).await.is_err() || closes {
            return;
        }
    }
}

fn sidecar(upstream: SocketAddr) -> (Process, ConfigDir) {
    let dir = ConfigDir::new();
    dir.write(
        "mesh.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app}}\nspec:\n  hosts: [app.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: {}, ports: {{http: {}}}}}]\n",
            upstream.ip(),
            upstream.port()
        ),
    );
    let config = dir.file("mesh.yaml");
    let process = Process::start(
        SIDECAR,
        &["--config", &config, "--outbound", ANY, "--admin", ANY, "--workers", "1", "--log", "error"],
    );
    (process, dir)
}

/// One answer as a strict client reads it; `None` when the connection ends before its end.
async fn answer(stream: &mut BufReader<TcpStream>, method: &str) -> (u16, Option<String>) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
            return (0, None);
        }
    }
    let lower = head.to_ascii_lowercase();
    let status: u16 = lower.split(' ').nth(1).unwrap().parse().unwrap();
    if (100..200).contains(&status) {
        return Box::pin(answer(stream, method)).await;
    }
    let header = |name: &str| {
        let mut found =
            lower.lines().filter_map(|line| line.split_once(": ")).filter(|(key, _)| *key == name);
        let value = found.next().map(|(_, value)| value.to_owned());
        assert!(found.next().is_none(), "{name} twice: {head}");
        value
    };
    let (length, coding) = (header("content-length"), header("transfer-encoding"));
    assert!(length.is_none() || coding.is_none(), "both framings: {head}");
    if method == "HEAD" || matches!(status, 204 | 304) {
        return (status, Some(String::new()));
    }
    let mut body = Vec::new();
    if coding.is_some() {
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                return (status, None);
            }
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            if stream.read_exact(&mut chunk).await.is_err() {
                return (status, None);
            }
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        body = vec![0; length.expect("a framing").parse().unwrap()];
        if stream.read_exact(&mut body).await.is_err() {
            return (status, None);
        }
    }
    (status, Some(String::from_utf8(body).unwrap()))
}

#[tokio::test]
async fn a8_broken_answers_leave_later_ones_alone() {
    const PAIRS: usize = 10_000;
    let cases = Arc::new(cases());
    let (addr, open) = upstream(Arc::clone(&cases)).await;
    let (sidecar, _dir) = sidecar(addr);
    let connect = async || BufReader::new(TcpStream::connect(sidecar.address("outbound")).await.unwrap());
    let mut stream = connect().await;
    let mut cut = 0;
    for pair in 0..PAIRS {
        let at = pair % cases.len();
        let Case { name, method, seen, .. } = &cases[at];
        // Both at once, as a client that pipelines writes them.
        let both = format!(
            "{method} /bad/{at}/{pair} HTTP/1.1\r\nhost: app\r\n\r\nGET /good/{pair} HTTP/1.1\r\nhost: app\r\n\r\n"
        );
        stream.get_mut().write_all(both.as_bytes()).await.unwrap();
        let (status, body) = answer(&mut stream, method).await;
        match (seen, status, body) {
            (Seen::Refused, 502, Some(_)) => {}
            (Seen::Status(want, text), got, Some(body)) if *want == got && body == *text => {}
            // A head that was not written yet is lost with its body.
            (Seen::Cut, 200 | 0, None) => {
                // The end of the connection is what tells the client, and the second request goes with it.
                cut += 1;
                stream = connect().await;
                stream
                    .get_mut()
                    .write_all(format!("GET /good/{pair} HTTP/1.1\r\nhost: app\r\n\r\n").as_bytes())
                    .await
                    .unwrap();
            }
            (_, status, body) => panic!("{name}: {status} {body:?}, not {seen:?}"),
        }
        let good = answer(&mut stream, "GET").await;
        assert_eq!(good, (200, Some(format!("/good/{pair}"))), "after {name}");
    }
    println!("a8: {PAIRS} pairs of {} kinds, 0 lost their place, {cut} were cut", cases.len());
    // One connection is kept, and it is one that has answered well.
    until("the broken connections to close", async || {
        let clusters = get_json(sidecar.address("admin"), "/clusters").await;
        let now = clusters["clusters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["now"]["connections"].as_u64().unwrap_or(0));
        let connections: u64 = now.sum();
        connections <= 1 && open.load(Ordering::SeqCst) as u64 == connections
    })
    .await;
}
