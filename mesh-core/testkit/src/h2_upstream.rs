//! An HTTP/2 upstream that is driven frame by frame: its settings, its answers and its end are what a test says, when
//! it says so.
//!
//! Of the fields of a request nothing is read, so nothing here has to decompress; a request is told from others by its
//! body. What a peer may not do, open more streams than it has agreed to, is counted.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::h2_raw::{
    ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, frame,
};

const PING: u8 = 6;

/// Fields of the static table: the statuses 200 and 500.
const OK: u8 = 0x88;
const FAILED: u8 = 0x8e;

/// How many streams the peer may have open (`SETTINGS_MAX_CONCURRENT_STREAMS`).
pub const MAX_STREAMS: u16 = 3;

/// What the peer may send of a stream before it hears more (`SETTINGS_INITIAL_WINDOW_SIZE`).
pub const INITIAL_WINDOW: u16 = 4;

/// A request that has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The connection that it came on, from 0.
    pub connection: usize,
    /// Its stream.
    pub stream: u32,
    /// What of its body has come.
    pub body: Vec<u8>,
    /// Whether it is whole.
    pub whole: bool,
}

/// What is done with a request as soon as it is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing: the test answers it.
    Hold,
    /// Answers 200 with the body of the request.
    Answer,
    /// Answers, and closes the connection without a word when the peer has the answer. What comes meanwhile is lost.
    AnswerAndClose,
    /// The same, and resets the connection.
    AnswerAndReset,
}

/// An upstream over HTTP/2 with prior knowledge.
#[derive(Debug)]
pub struct Http2Upstream {
    /// Where it listens.
    pub addr: SocketAddr,
    state: Arc<Mutex<State>>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    settings: Vec<(u16, u32)>,
    act: Act,
    connections: Vec<Connection>,
    requests: Vec<Request>,
    too_many: usize,
}

#[derive(Debug)]
struct Connection {
    /// Frames to write; gone when the connection is to end.
    out: Option<mpsc::UnboundedSender<Vec<u8>>>,
    is_open: bool,
    /// Settings of ours that the peer has not acknowledged, oldest first.
    unacknowledged: Vec<Vec<(u16, u32)>>,
    allowed: u32,
    streams: HashSet<u32>,
}

impl Http2Upstream {
    /// Starts one on a free port. Its connections begin with these settings.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn start(settings: &[(u16, u32)], act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(State {
            settings: settings.to_vec(),
            act,
            connections: Vec::new(),
            requests: Vec::new(),
            too_many: 0,
        }));
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Self { addr, state, accepting }
    }

    /// The requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.state).requests.clone()
    }

    /// How many requests are whole.
    #[must_use]
    pub fn whole(&self) -> usize {
        lock(&self.state).requests.iter().filter(|request| request.whole).count()
    }

    /// How often each body of a whole request has come.
    #[must_use]
    pub fn bodies(&self) -> HashMap<Vec<u8>, usize> {
        let mut bodies = HashMap::new();
        for request in lock(&self.state).requests.iter().filter(|request| request.whole) {
            *bodies.entry(request.body.clone()).or_default() += 1;
        }
        bodies
    }

    /// How many connections there have been.
    #[must_use]
    pub fn connections(&self) -> usize {
        lock(&self.state).connections.len()
    }

    /// How many connections are open.
    #[must_use]
    pub fn open(&self) -> usize {
        lock(&self.state).connections.iter().filter(|connection| connection.is_open).count()
    }

    /// How many streams were opened beyond what the peer had agreed to.
    #[must_use]
    pub fn too_many(&self) -> usize {
        lock(&self.state).too_many
    }

    /// What is done with requests that become whole from now on.
    pub fn set_act(&self, act: Act) {
        lock(&self.state).act = act;
    }

    /// Changes the settings of every connection, and of those to come.
    pub fn set_settings(&self, settings: &[(u16, u32)]) {
        let mut state = lock(&self.state);
        state.settings = settings.to_vec();
        for connection in &mut state.connections {
            connection.send_settings(settings);
        }
    }

    /// Whether the peer has acknowledged all settings on every open connection.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let state = lock(&self.state);
        state.connections.iter().all(|connection| !connection.is_open || connection.unacknowledged.is_empty())
    }

    /// Answers a request with status 200 and its own body.
    pub fn answer(&self, request: &Request) {
        lock(&self.state).answer(request.connection, request.stream, OK);
    }

    /// Answers a request with status 500, whether it is whole or not.
    pub fn fail(&self, request: &Request) {
        lock(&self.state).answer(request.connection, request.stream, FAILED);
    }

    /// Answers every whole request that has no answer.
    pub fn answer_all(&self) {
        let mut state = lock(&self.state);
        for request in state.requests.clone() {
            if request.whole {
                state.answer(request.connection, request.stream, OK);
            }
        }
    }

    /// Says on a connection that nothing above `last` is looked at, for this reason (0 is none).
    pub fn go_away(&self, connection: usize, last: u32, code: u32) {
        let payload = [last.to_be_bytes(), code.to_be_bytes()].concat();
        if let Some(connection) = lock(&self.state).connections.get(connection) {
            connection.send(frame(GOAWAY, 0, 0, &payload));
        }
    }

    /// Ends a connection when everything has been written.
    pub fn close(&self, connection: usize) {
        if let Some(connection) = lock(&self.state).connections.get_mut(connection) {
            connection.out = None;
        }
    }
}

impl Drop for Http2Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl State {
    fn answer(&mut self, connection: usize, stream: u32, status: u8) {
        let body = self
            .requests
            .iter()
            .find(|request| (request.connection, request.stream) == (connection, stream))
            .map(|request| request.body.clone())
            .unwrap_or_default();
        let Some(connection) = self.connections.get_mut(connection) else { return };
        if connection.streams.remove(&stream) {
            let mut frames = frame(HEADERS, END_HEADERS, stream, &[status]);
            frames.extend(frame(DATA, END_STREAM, stream, &body));
            connection.send(frames);
        }
    }
}

impl Connection {
    fn send(&self, frames: Vec<u8>) {
        if let Some(out) = &self.out {
            // A connection that has ended takes nothing.
            let _ = out.send(frames);
        }
    }

    fn send_settings(&mut self, settings: &[(u16, u32)]) {
        let payload: Vec<u8> = settings
            .iter()
            .flat_map(|(id, value)| id.to_be_bytes().into_iter().chain(value.to_be_bytes()))
            .collect();
        self.unacknowledged.push(settings.to_vec());
        self.send(frame(SETTINGS, 0, 0, &payload));
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("not poisoned")
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) {
    // Whoever is gone already waits for nothing.
    let _ = stream.set_nodelay(true);
    let (mut read, mut write) = stream.into_split();
    let (out, mut frames) = mpsc::unbounded_channel::<Vec<u8>>();
    let index = {
        let mut state = lock(&state);
        let settings = state.settings.clone();
        let mut connection = Connection {
            out: Some(out),
            is_open: true,
            unacknowledged: Vec::new(),
            allowed: u32::MAX,
            streams: HashSet::new(),
        };
        connection.send_settings(&settings);
        state.connections.push(connection);
        state.connections.len() - 1
    };
    let reading = async {
        let mut ending = None;
        let mut preface = [0_u8; PREFACE.len()];
        if read.read_exact(&mut preface).await.is_err() || preface != PREFACE {
            return false;
        }
        loop {
            let mut head = [0_u8; 9];
            if read.read_exact(&mut head).await.is_err() {
                return false;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let id = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
            let mut payload = vec![0_u8; length];
            if read.read_exact(&mut payload).await.is_err() {
                return false;
            }
            if let Some(reset) = ending {
                // The peer answers in order, so it has read what came before.
                if (head[3], head[4]) == (PING, ACK) {
                    return reset;
                }
                continue;
            }
            let mut state = lock(&state);
            let act = state.hear(index, head[3], head[4], id, payload);
            if let Some(act @ (Act::AnswerAndClose | Act::AnswerAndReset)) = act {
                ending = Some(act == Act::AnswerAndReset);
                state.connections[index].send(frame(PING, 0, 0, &[0; 8]));
            }
        }
    };
    let writing = async {
        while let Some(frames) = frames.recv().await {
            if write.write_all(&frames).await.is_err() {
                return;
            }
        }
    };
    // The writer ends when the test says so, and then the connection does.
    let reset = {
        let (mut reading, mut writing) = (std::pin::pin!(reading), std::pin::pin!(writing));
        tokio::select! {
            reset = &mut reading => {
                lock(&state).connections[index].out = None;
                // What was said before the end is still written.
                writing.await;
                reset
            }
            () = &mut writing => false,
        }
    };
    lock(&state).connections[index].is_open = false;
    if let Ok(stream) = read.reunite(write)
        && reset
    {
        // Resets the connection when it is closed.
        let _ = stream.set_zero_linger();
    }
}

impl State {
    /// One frame; what is to be done when it makes a request whole.
    fn hear(&mut self, connection: usize, kind: u8, flags: u8, stream: u32, payload: Vec<u8>) -> Option<Act> {
        let peer = self.connections.get_mut(connection)?;
        match kind {
            SETTINGS if flags & ACK == 0 => peer.send(frame(SETTINGS, ACK, 0, &[])),
            SETTINGS if !peer.unacknowledged.is_empty() => {
                let settings = peer.unacknowledged.remove(0);
                let allowed = settings.iter().find(|(id, _)| *id == MAX_STREAMS);
                peer.allowed = allowed.map_or(peer.allowed, |(_, allowed)| *allowed);
            }
            PING if flags & ACK == 0 => peer.send(frame(PING, ACK, 0, &payload)),
            HEADERS => {
                if peer.streams.len() >= peer.allowed as usize {
                    self.too_many += 1;
                }
                peer.streams.insert(stream);
                self.requests.push(Request { connection, stream, body: Vec::new(), whole: false });
            }
            RST_STREAM => {
                peer.streams.remove(&stream);
            }
            _ => {}
        }
        let ended = matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0;
        let request = self
            .requests
            .iter_mut()
            .rev()
            .find(|request| (request.connection, request.stream) == (connection, stream))?;
        if kind == DATA {
            request.body.extend_from_slice(&payload);
        }
        if !ended {
            return None;
        }
        request.whole = true;
        let act = self.act;
        if act != Act::Hold {
            self.answer(connection, stream, OK);
        }
        Some(act)
    }
}
