//! Connections: how many there are, and how long they may take for what they send and read.

use super::offers::Offers;
use super::state::{Phase, State};
use super::tls::Tls;
use axum::Router;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tower::Service;

/// Bytes of a request's headers, and of what is read or written at a time.
const BUFFER: usize = 32 * 1024;
/// Headers of a request.
const MOST_HEADERS: usize = 100;
/// After a connection could not be accepted (no file descriptor is left): time for others to end.
const PAUSE: Duration = Duration::from_millis(50);
/// Requests of one connection of HTTP/2 at a time; its client holds others back.
const MOST_STREAMS: u32 = 256;
/// Bytes that a client may send of one request, and of all of a connection, before they are read.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes with which HTTP/2 begins (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// What a connection beyond the limit is told.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// TCP; port 0 takes one that is free.
    Tcp(SocketAddr),
    /// A Unix socket's path.
    Unix(PathBuf),
    /// TCP, for gRPC alone: HTTP/2 without a preceding HTTP/1.1.
    Grpc(SocketAddr),
    /// A Unix socket's path, for gRPC alone.
    GrpcUnix(PathBuf),
    /// TCP, for /metrics and health alone, without a key and without TLS.
    Probes(SocketAddr),
    /// TCP, for what [`Settings::admin`](super::Settings::admin) allows, alone.
    Admin(SocketAddr),
    /// A Unix socket's path, for what [`Settings::admin`](super::Settings::admin) allows, alone. Only the server's own user and root can connect.
    AdminUnix(PathBuf),
    /// All sockets that systemd hands over (`LISTEN_FDS`); they can be taken once.
    HandedOver,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Grpc(address) => write!(f, "grpc://{address}"),
            Self::GrpcUnix(path) => write!(f, "unix:{} (gRPC)", path.display()),
            Self::Probes(address) => write!(f, "http://{address} (health and metrics)"),
            Self::Admin(address) => write!(f, "http://{address} (admin)"),
            Self::AdminUnix(path) => write!(f, "unix:{} (admin)", path.display()),
            Self::HandedOver => write!(f, "the sockets that systemd hands over"),
        }
    }
}

/// What is spoken and answered on an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Http,
    Grpc,
    Probes,
    Admin,
}

/// An address that is listened on.
pub(super) struct Bound {
    listener: Listener,
    pub purpose: Purpose,
}

/// The path of a Unix socket that was made here is removed when this is dropped.
enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener, Option<PathBuf>),
}

impl Bound {
    /// What listens on `address`: one listener, but for those that are handed over.
    ///
    /// # Errors
    /// An address that is taken or not this machine's.
    pub fn all(address: &Address) -> io::Result<Vec<Self>> {
        let (listeners, purpose) = match address {
            Address::Tcp(address) => (vec![Listener::tcp(address)?], Purpose::Http),
            Address::Unix(path) => (vec![Listener::unix(path)?], Purpose::Http),
            Address::Grpc(address) => (vec![Listener::tcp(address)?], Purpose::Grpc),
            Address::GrpcUnix(path) => (vec![Listener::unix(path)?], Purpose::Grpc),
            Address::Probes(address) => (vec![Listener::tcp(address)?], Purpose::Probes),
            Address::Admin(address) => (vec![Listener::tcp(address)?], Purpose::Admin),
            Address::AdminUnix(path) => {
                use std::os::unix::fs::PermissionsExt;
                let listener = Listener::unix(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                (vec![listener], Purpose::Admin)
            }
            Address::HandedOver => (handed_over()?, Purpose::Http),
        };
        for listener in &listeners {
            match listener {
                Listener::Tcp(listener) => listener.set_nonblocking(true)?,
                Listener::Unix(listener, _) => listener.set_nonblocking(true)?,
            }
        }
        Ok(listeners.into_iter().map(|listener| Self { listener, purpose }).collect())
    }

    /// The address with the port that was taken.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match (&self.listener, self.purpose) {
            (Listener::Tcp(listener), purpose) => {
                let address = listener.local_addr()?;
                match purpose {
                    Purpose::Http => Address::Tcp(address),
                    Purpose::Grpc => Address::Grpc(address),
                    Purpose::Probes => Address::Probes(address),
                    Purpose::Admin => Address::Admin(address),
                }
            }
            (Listener::Unix(listener, path), purpose) => {
                let own = listener.local_addr()?.as_pathname().map(PathBuf::from);
                let path = path.clone().or(own).unwrap_or_default();
                match purpose {
                    Purpose::Grpc => Address::GrpcUnix(path),
                    Purpose::Admin => Address::AdminUnix(path),
                    // Probes have no Unix socket.
                    Purpose::Http | Purpose::Probes => Address::Unix(path),
                }
            }
        })
    }
}

impl Listener {
    fn tcp(address: &SocketAddr) -> io::Result<Self> {
        std::net::TcpListener::bind(address).map(Self::Tcp)
    }

    fn unix(path: &PathBuf) -> io::Result<Self> {
        remove_abandoned(path);
        Ok(Self::Unix(std::os::unix::net::UnixListener::bind(path)?, Some(path.clone())))
    }
}

/// The sockets of systemd, TCP's and Unix'.
///
/// # Errors
/// None, or one of another kind.
fn handed_over() -> io::Result<Vec<Listener>> {
    let mut sockets = listenfd::ListenFd::from_env();
    if sockets.len() == 0 {
        return Err(io::Error::other("systemd handed over no sockets, or they were taken before"));
    }
    (0..sockets.len())
        .map(|place| {
            // Each is tried as the one and then as the other: a failure leaves it where it is.
            if let Ok(Some(listener)) = sockets.take_tcp_listener(place) {
                return Ok(Listener::Tcp(listener));
            }
            let unix = sockets.take_unix_listener(place)?;
            unix.map(|listener| Listener::Unix(listener, None))
                .ok_or_else(|| io::Error::other(format!("socket {place} was taken before")))
        })
        .collect()
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, Some(path)) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes a socket at `path` that nobody listens on: a killed server leaves its own.
fn remove_abandoned(path: &std::path::Path) {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refused =
        || std::os::unix::net::UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && refused() {
        let _ = std::fs::remove_file(path);
    }
}

/// Serves `router` on `bound` until `closing` says true; then ends what is under way on its connections, and returns.
///
/// # Errors
/// A listener that the runtime does not take.
pub(super) async fn serve(
    bound: Bound,
    router: Router,
    state: Arc<State>,
    slots: Arc<Semaphore>,
    closing: watch::Receiver<bool>,
    tls: Option<Tls>,
) -> io::Result<()> {
    let mut connections = JoinSet::new();
    let grpc = bound.purpose == Purpose::Grpc;
    // A Unix socket's clients are of this machine, and probes speak no TLS.
    let tls = match (&bound.listener, bound.purpose) {
        (Listener::Unix(..), _) | (_, Purpose::Probes) => None,
        (_, Purpose::Grpc) => tls.map(|tls| tls.for_http2()),
        (_, Purpose::Http | Purpose::Admin) => tls,
    };
    let mut door = Door { router, state, slots, closing: closing.clone(), grpc, tls };
    match &bound.listener {
        Listener::Tcp(listener) => {
            let listener = TcpListener::from_std(listener.try_clone()?)?;
            let accept = || async {
                let (stream, _) = listener.accept().await?;
                // Answers are written whole: waiting for more would only delay them.
                let _ = stream.set_nodelay(true);
                Ok(stream)
            };
            door.accept(accept, &mut connections).await;
        }
        Listener::Unix(listener, _) => {
            let listener = UnixListener::from_std(listener.try_clone()?)?;
            door.accept(|| async { listener.accept().await.map(|(stream, _)| stream) }, &mut connections).await;
        }
    }
    drop(bound);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// What connections of one listener share.
struct Door {
    router: Router,
    state: Arc<State>,
    slots: Arc<Semaphore>,
    closing: watch::Receiver<bool>,
    /// Whether they speak HTTP/2, else HTTP/1.1.
    grpc: bool,
    tls: Option<Tls>,
}

impl Door {
    async fn accept<S, F>(&mut self, accept: impl Fn() -> F, connections: &mut JoinSet<()>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = io::Result<S>>,
    {
        loop {
            let accepted = tokio::select! {
                accepted = accept() => accepted,
                // Ends with the server, too, where the sender is gone.
                () = closed(&mut self.closing) => return,
                // Ended ones are forgotten as they end.
                Some(_) = connections.join_next() => continue,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    log::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            match self.slots.clone().try_acquire_owned() {
                Ok(slot) => {
                    let (router, state, closing) = (self.router.clone(), self.state.clone(), self.closing.clone());
                    let conversation = Conversation { router, state, closing, _slot: slot };
                    connections.spawn(conversation.hold(stream, self.tls.clone(), self.grpc));
                }
                Err(_) => {
                    self.state.metrics.rejected.with_label_values(&["connections"]).inc();
                    // Within TLS a handshake would have to come first, and HTTP/2 takes what is said in HTTP/1.1 for a broken frame; closing says enough.
                    if self.tls.is_none() && !self.grpc {
                        connections.spawn(turn_away(stream));
                    }
                }
            }
        }
    }
}

/// Waits until connections are to be closed.
async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|&closing| closing).await;
}

/// Tells a client that there is no room, without waiting for what it has to say.
async fn turn_away(mut stream: impl AsyncWrite + Unpin) {
    let _ = tokio::time::timeout(PAUSE, stream.write_all(FULL)).await;
}

/// A connection that has a place.
struct Conversation {
    router: Router,
    state: Arc<State>,
    closing: watch::Receiver<bool>,
    /// Given back when it ends.
    _slot: OwnedSemaphorePermit,
}

impl Conversation {
    /// From the handshake, where there is one, to the last request.
    async fn hold<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(mut self, stream: S, tls: Option<Tls>, grpc: bool) {
        let Some(tls) = tls else { return self.speak(stream, grpc).await };
        let begun = tokio::select! {
            begun = tls.begin(stream, self.state.settings.header_timeout) => begun,
            () = closed(&mut self.closing) => return,
        };
        match begun {
            Ok(stream) => self.speak(stream, grpc).await,
            Err(error) => log::debug!("a connection did not come to TLS: {error}"),
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(mut self, stream: S, grpc: bool) {
        self.state.metrics.connections.inc();
        let ended = if grpc { self.http2(stream).await } else { self.http1(stream).await };
        self.state.metrics.connections.dec();
        if let Err(reason) = ended {
            log::debug!("a connection ended: {reason}");
        }
    }

    async fn http1<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(&mut self, stream: S) -> Result<(), String> {
        let settings = &self.state.settings;
        let stream = TimedIo { stream, patience: settings.write_timeout, stalled: None, opening: None };
        let router = self.router.clone();
        let service = service_fn(move |request: hyper::Request<Incoming>| router.clone().call(request));
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(settings.header_timeout).max_headers(MOST_HEADERS).max_buf_size(BUFFER);
        served(http.serve_connection(TokioIo::new(stream), service), &mut self.closing).await
    }

    /// With many requests at a time. A connection that is idle is asked whether its client still lives.
    async fn http2<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(&mut self, stream: S) -> Result<(), String> {
        let settings = &self.state.settings;
        let opening = Some((Box::pin(tokio::time::sleep(settings.header_timeout)), PREFACE));
        let stream = TimedIo { stream, patience: settings.write_timeout, stalled: None, opening };
        let offers = Offers::default();
        let (router, offered) = (self.router.clone(), offers.clone());
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let (answer, offers) = (router.clone().call(request), offered.clone());
            async move { answer.await.map(|response| response.map(|body| offers.offer(body))) }
        });
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(settings.header_timeout)
            .keep_alive_timeout(settings.header_timeout)
            .max_concurrent_streams(MOST_STREAMS)
            .max_header_list_size(BUFFER as u32)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            ended = served(connection, &mut self.closing) => ended,
            () = offers.stalled(settings.write_timeout) => Err(format!("the client has taken nothing of an answer for {:?}", settings.write_timeout)),
        }
    }
}

/// `connection` to its end, which is after what is under way when connections are to be closed.
async fn served<C: GracefulConnection>(connection: C, closing: &mut watch::Receiver<bool>) -> Result<(), String>
where
    C::Error: std::fmt::Display,
{
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closed(closing) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(|error| error.to_string())
}

/// Waits until no request is under way.
pub(super) async fn idle(state: &State) {
    debug_assert_eq!(state.phase(), Phase::Draining);
    let all = u32::try_from(state.settings.max_concurrent_requests).unwrap_or(u32::MAX);
    // The semaphore is never closed.
    let _ = state.requests.acquire_many(all).await;
}

/// A stream that fails when its reader takes nothing for `patience`, or its client does not begin in time.
struct TimedIo<S> {
    stream: S,
    patience: Duration,
    /// Since when it takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Until when the first bytes must have come, and how many of them are missing. HTTP/1.1 has a time for headers of its own.
    opening: Option<(Pin<Box<Sleep>>, usize)>,
}

impl<S> TimedIo<S> {
    /// `written`, or a failure where it has been pending too long.
    fn timed<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, format!("the client has read nothing for {patience:?}"))))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some((until, missing)) = &mut self.opening {
            *missing = missing.saturating_sub(buffer.filled().len() - before);
            if *missing == 0 {
                self.opening = None;
            } else if until.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the client has not opened its connection in time",
                )));
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.timed(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.timed(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.timed(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
