//! `trt-embed serve`: models over HTTP and gRPC, as text-embeddings-inference and OpenAI serve them.

use super::settings::{self, Backend, CudaPrecision, EnginePrecision, ExecutorArgs, PoolingArg};
use super::{Usage, progress, signals};
use anyhow::{Context, Result};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use trt_embed::EmbedderBuilder;
use trt_embed::server::{Address, Admin, Collector, Ended, Served, Server, Settings, TlsFiles};

/// Serves models over HTTP, and over gRPC with --grpc-port.
///
/// Speaks to clients of text-embeddings-inference (/embed, /embed_all, /similarity, /tokenize, /decode, /info) and of OpenAI (/v1/embeddings,
/// /v1/models). Health is told under /health, metrics under /metrics. Flags that text-embeddings-inference has too, and their environment
/// variables, mean what they mean there.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Model folder or hub id `org/name[@revision]`, with a name before it or its own; may be repeated. Requests that name no model get the first.
    #[arg(short = 'm', long = "model", value_name = "[NAME=]MODEL", env = "TRT_EMBED_MODEL")]
    models: Vec<String>,
    /// As --model, under text-embeddings-inference's name.
    #[arg(long, env = "MODEL_ID", value_name = "MODEL")]
    model_id: Option<String>,
    /// Revision of --model-id on the hub.
    #[arg(long, env = "REVISION", requires = "model_id")]
    revision: Option<String>,
    /// Names of the first model in requests and answers, beside its own.
    #[arg(long, env = "SERVED_MODEL_NAME", value_delimiter = ',', value_name = "NAME")]
    served_model_name: Vec<String>,
    #[command(flatten)]
    executor: ExecutorArgs,
    /// Most tokens of one batch, padding included: as --batch-tokens, under text-embeddings-inference's name [default: the backend's choice].
    #[arg(long, env = "MAX_BATCH_TOKENS", value_name = "N", conflicts_with = "batch_tokens")]
    max_batch_tokens: Option<NonZeroUsize>,
    /// Precision, under text-embeddings-inference's name: as --cuda-precision, or --engine-precision with `--backend tensorrt`. The CPU has float32 alone.
    #[arg(long, env = "DTYPE", value_enum, value_name = "DTYPE", conflicts_with_all = ["cuda_precision", "engine_precision", "engine"])]
    dtype: Option<Dtype>,
    /// Long texts that are tokenised at a time [default: as many as cores].
    #[arg(long, env = "TOKENIZATION_WORKERS", value_name = "N")]
    tokenization_workers: Option<NonZeroUsize>,
    /// Most texts of one batch: as --batch-size.
    #[arg(long, env = "MAX_BATCH_REQUESTS", value_name = "N", conflicts_with = "batch_size")]
    max_batch_requests: Option<NonZeroUsize>,
    /// How token states become one vector; several modes are concatenated.
    #[arg(long, env = "POOLING", value_enum, value_delimiter = ',', value_name = "MODE[,MODE…]", default_value = "auto")]
    pooling: Vec<PoolingArg>,
    /// Prompt of requests that name none, by its name in the model folder; empty for none [default: the model's default prompt].
    #[arg(long, env = "DEFAULT_PROMPT_NAME", value_name = "NAME", conflicts_with = "default_prompt")]
    default_prompt_name: Option<String>,
    /// Prompt of requests that name none, as text.
    #[arg(long, env = "DEFAULT_PROMPT", value_name = "TEXT")]
    default_prompt: Option<String>,
    /// Texts, one a line, over which the ranges of int8 and uint8 vectors are taken [default: these encodings are refused].
    #[arg(long, env = "TRT_EMBED_CALIBRATION_TEXTS", value_name = "FILE")]
    calibration_texts: Option<PathBuf>,
    /// Address to listen on; that of the environment variable HOSTNAME where that is one [default: 0.0.0.0].
    #[arg(long, value_name = "ADDRESS")]
    hostname: Option<String>,
    /// Port to listen on; 0 takes a free one.
    #[arg(short, long, env = "PORT", default_value_t = 3000)]
    port: u16,
    /// Port for gRPC, on the same address [default: no gRPC].
    #[arg(long, env = "TRT_EMBED_GRPC_PORT", value_name = "PORT")]
    grpc_port: Option<u16>,
    /// Unix socket for gRPC in the place of --grpc-port.
    #[arg(long, env = "TRT_EMBED_GRPC_UNIX_SOCKET", value_name = "PATH", conflicts_with = "grpc_port")]
    grpc_unix_socket: Option<PathBuf>,
    /// Where models are loaded, reloaded and removed while the server serves: a port of loopback, ADDRESS:PORT, or the path of a Unix socket, with a
    /// `/` in it [default: nowhere].
    #[arg(long, env = "TRT_EMBED_ADMIN", value_name = "PORT|ADDRESS:PORT|PATH", value_parser = admin_address)]
    admin: Option<Address>,
    /// Keys of which requests to --admin must bring one, with commas between them; needed where that address is not this machine's alone.
    #[arg(
        long,
        env = "TRT_EMBED_ADMIN_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        value_name = "KEY[,KEY…]",
        requires = "admin"
    )]
    admin_key: Vec<String>,
    /// Port for /metrics and health alone, without a key and without TLS, beside the others [default: they stand on the other port alone].
    #[arg(long, env = "PROMETHEUS_PORT", value_name = "PORT")]
    prometheus_port: Option<u16>,
    /// Unix socket to listen on in the place of an address.
    #[arg(long, env = "TRT_EMBED_UNIX_SOCKET", value_name = "PATH", conflicts_with = "hostname")]
    unix_socket: Option<PathBuf>,
    /// Most requests under way; others are answered 429 at once.
    #[arg(long, env = "MAX_CONCURRENT_REQUESTS", value_name = "N", default_value_t = 512)]
    max_concurrent_requests: usize,
    /// Most inputs of one request, and messages of one gRPC stream that are under way.
    #[arg(long, env = "MAX_CLIENT_BATCH_SIZE", value_name = "N", default_value_t = 32)]
    max_client_batch_size: usize,
    /// Most tokens that wait for one model; requests beyond them are answered 429 at once.
    #[arg(long, env = "TRT_EMBED_MAX_QUEUE_TOKENS", value_name = "N", default_value_t = 262_144)]
    max_queue_tokens: usize,
    /// Milliseconds that a text may wait for others to share its batch though the executor is free, at most 1000 [default: not at all]. Under load texts gather
    /// while batches run, so that this helps few.
    #[arg(long, env = "TRT_EMBED_LINGER", value_name = "MILLISECONDS", default_value_t = 0.0, hide_default_value = true, value_parser = linger)]
    linger: f64,
    /// Most batches of interactive texts that are begun one after another while bulk texts wait; with 0 bulk goes first [default: 4].
    #[arg(long, env = "TRT_EMBED_OVERTAKINGS", value_name = "N")]
    overtakings: Option<usize>,
    /// Most bytes of a body.
    #[arg(long, env = "PAYLOAD_LIMIT", value_name = "BYTES", default_value_t = 2_000_000)]
    payload_limit: usize,
    /// Most connections.
    #[arg(long, env = "TRT_EMBED_MAX_CONNECTIONS", value_name = "N", default_value_t = 2048)]
    max_connections: usize,
    /// Whether texts that are too long are cut where the request does not say.
    #[arg(long, env = "AUTO_TRUNCATE", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    auto_truncate: bool,
    /// Keys of which requests must bring one, with commas between them; those for health, /metrics and / need none.
    #[arg(long, env = "API_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY[,KEY…]")]
    api_key: Vec<String>,
    /// Origins whose pages may read answers [default: all].
    #[arg(long, env = "CORS_ALLOW_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    cors_allow_origin: Vec<String>,
    /// Certificate of the server in PEM, with those between it and the authority's; read anew when it changes. TCP then speaks TLS alone.
    #[arg(long, env = "TRT_EMBED_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key in PEM.
    #[arg(long, env = "TRT_EMBED_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// OpenTelemetry collector that takes a span of each request, over HTTP in JSON: http://HOST[:4318][/v1/traces].
    #[arg(long, env = "OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// Name that these spans come under.
    #[arg(long, env = "OTLP_SERVICE_NAME", value_name = "NAME", default_value = "trt-embed")]
    otlp_service_name: String,
    /// Seconds for a request's headers to arrive, and for a connection to be idle.
    #[arg(long, env = "TRT_EMBED_HEADER_TIMEOUT", value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    header_timeout: f64,
    /// Seconds for a body to arrive.
    #[arg(long, env = "TRT_EMBED_BODY_TIMEOUT", value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    body_timeout: f64,
    /// Seconds for which a client may read nothing of its answer.
    #[arg(long, env = "TRT_EMBED_WRITE_TIMEOUT", value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    write_timeout: f64,
    /// Seconds after which inputs that have not begun to run are given up, and their request is answered 429.
    #[arg(long, env = "TRT_EMBED_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 60.0, value_parser = seconds)]
    request_timeout: f64,
    /// Seconds to end what is under way after SIGTERM or SIGINT.
    #[arg(long, env = "TRT_EMBED_SHUTDOWN_TIMEOUT", value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    shutdown_timeout: f64,
    /// Seconds after which a model that does not answer its watchdog is not ready.
    #[arg(long, env = "TRT_EMBED_HEALTH_TIMEOUT", value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds)]
    health_timeout: f64,
    #[command(flatten)]
    of_tei: OfTei,
    /// Seconds after which a model whose executor fails is loaded anew.
    #[arg(long, env = "TRT_EMBED_RECOVERY_DELAY", value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    recovery_delay: f64,
    /// Seconds after which a server ends whose model does not come back so.
    #[arg(long, env = "TRT_EMBED_RECOVERY_TIMEOUT", value_name = "SECONDS", default_value_t = 120.0, value_parser = seconds)]
    recovery_timeout: f64,
    /// Log lines as JSON.
    #[arg(long, env = "JSON_OUTPUT")]
    pub json_output: bool,
}

/// Flags of text-embeddings-inference that mean nothing here, or that are refused with what is to be done in their place.
#[derive(Debug, clap::Args)]
struct OfTei {
    /// Socket between text-embeddings-inference and its backends; there is none here.
    #[arg(long, env = "UDS_PATH", value_name = "PATH", hide = true)]
    uds_path: Option<PathBuf>,
    #[arg(long, env = "DISABLE_SPANS", hide = true)]
    disable_spans: bool,
    #[arg(long, env = "DENSE_PATH", hide = true)]
    dense_path: Option<String>,
    #[arg(long, alias = "hf-api-token", hide = true)]
    hf_token: Option<String>,
    #[arg(long, hide = true)]
    huggingface_hub_cache: Option<PathBuf>,
}

impl OfTei {
    /// # Errors
    /// Those that would mean something else here.
    fn check(&self) -> Result<()> {
        let refused = [
            (
                self.dense_path.is_some(),
                "--dense-path: the Dense modules that modules.json of the model names are run; change it there",
            ),
            (self.hf_token.is_some(), "--hf-token: others see a command line; set the environment variable HF_TOKEN"),
            (self.huggingface_hub_cache.is_some(), "--huggingface-hub-cache: set the environment variable HF_HUB_CACHE"),
        ];
        match refused.iter().find(|(given, _)| *given) {
            Some((_, reason)) => Err(Usage((*reason).into()).into()),
            None => Ok(()),
        }
    }
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Dtype {
    Float16,
    Bfloat16,
    Float32,
}

impl Dtype {
    /// Sets what it means for `executor`.
    ///
    /// # Errors
    /// What that one does not have.
    fn set(self, executor: &mut ExecutorArgs) -> Result<()> {
        let refused = |reason: &str| Err(Usage(format!("--dtype: {reason}")).into());
        match (executor.backend, self) {
            // All that it has.
            (Backend::Cpu, Self::Float32) => {}
            (Backend::Cpu, _) => {
                return refused("the CPU backend computes in float32 alone; leave it out, or use --backend cuda");
            }
            (Backend::TensorRt, Self::Bfloat16) => {
                return refused("engines have float16 and float32; use --backend cuda for bfloat16");
            }
            (Backend::TensorRt, Self::Float16) => executor.engine_precision = Some(EnginePrecision::Fp16),
            (Backend::TensorRt, Self::Float32) => executor.engine_precision = Some(EnginePrecision::Fp32),
            // Without the kernels `auto` has the CPU.
            (Backend::Auto, Self::Float32) if !cfg!(feature = "cuda") => {}
            (Backend::Auto | Backend::Cuda, Self::Float16) => executor.cuda_precision = Some(CudaPrecision::Fp16),
            (Backend::Auto | Backend::Cuda, Self::Bfloat16) => executor.cuda_precision = Some(CudaPrecision::Bf16),
            (Backend::Auto | Backend::Cuda, Self::Float32) => executor.cuda_precision = Some(CudaPrecision::Fp32),
        }
        Ok(())
    }
}

const AFTER_HELP: &str = "\
Examples:
  trt-embed serve -m sentence-transformers/all-MiniLM-L6-v2 --port 8080
  trt-embed serve --model small=models/all-MiniLM-L6-v2 --model large=models/all-mpnet-base-v2 --api-key \"$KEY\"
  curl localhost:8080/embed -H 'Content-Type: application/json' -d '{\"inputs\": \"A cat sat.\"}'

Sockets that systemd hands over (socket activation) are listened on in the place of --hostname, --port and --unix-socket.

SIGTERM and SIGINT: the server is not ready at once, refuses new work and ends what is under way; a second one ends it at once.
Exit status: 0 all that was under way was answered, 1 a fault, or requests were cut off by --shutdown-timeout, 2 wrong usage,
3 a model's executor was lost and did not come back (start the server again), 128 + N ended at once by a second signal N.";

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    args.of_tei.check()?;
    let args = Arc::new(args);
    let models = args.served()?;
    let server = Server::bind(&args.addresses()?, models, args.settings()?)?;
    for address in server.addresses() {
        log::info!("listening on {address}");
    }
    let handle = server.handle();
    let _stoppable = signals::stop_by(move || handle.stop());
    match server.run()? {
        Ended::Cut { requests } => {
            let limit = args.shutdown_timeout;
            anyhow::bail!("{requests} requests were cut off after {limit} s of --shutdown-timeout")
        }
        _ => Ok(()),
    }
}

impl Args {
    /// What runs the models.
    fn executor(&self) -> Result<ExecutorArgs> {
        let mut executor = ExecutorArgs {
            batch_tokens: self.executor.batch_tokens.or(self.max_batch_tokens),
            batch_size: self.executor.batch_size.or(self.max_batch_requests),
            ..self.executor.clone()
        };
        if let Some(dtype) = self.dtype {
            dtype.set(&mut executor)?;
        }
        Ok(executor)
    }

    fn builder(&self, source: &str, executor: &ExecutorArgs) -> Result<EmbedderBuilder> {
        let mut builder = self.with_vectors(settings::builder(source, executor)?)?.progress(progress::downloads());
        if let Some(batches) = self.overtakings {
            builder = builder.overtakings(batches);
        }
        Ok(builder.linger(Duration::from_secs_f64(self.linger / 1e3)))
    }

    fn served(&self) -> Result<Vec<Served>> {
        let executor = self.executor()?;
        let of_tei = self.model_id.iter().map(|id| match &self.revision {
            None => id.clone(),
            Some(revision) => format!("{id}@{revision}"),
        });
        let mut served = Vec::new();
        for named in of_tei.chain(self.models.iter().cloned()) {
            let (name, source) = name_and_source(&named);
            served.push(Served { names: vec![name.to_owned()], builder: self.builder(source, &executor)? });
        }
        let Some(first) = served.first_mut() else {
            return Err(Usage("serve needs a model: -m FOLDER, -m ORG/NAME or --model NAME=MODEL".into()).into());
        };
        let own = std::mem::take(&mut first.names);
        for name in self.served_model_name.iter().cloned().chain(own) {
            if !first.names.contains(&name) {
                first.names.push(name);
            }
        }
        Ok(served)
    }

    /// What becomes of texts where a request does not say.
    fn with_vectors(&self, mut builder: EmbedderBuilder) -> Result<EmbedderBuilder> {
        if let Some(modes) = settings::modes(&self.pooling)? {
            builder = builder.pooling(&modes);
        }
        Ok(match (&self.default_prompt_name, &self.default_prompt) {
            (None, None) => builder,
            (None, Some(text)) => builder.prompt(text),
            (Some(name), _) if name.is_empty() => builder.prompt(""),
            (Some(name), _) => builder.prompt_name(name),
        })
    }

    fn addresses(&self) -> Result<Vec<Address>> {
        let first = match &self.unix_socket {
            _ if handed_over() => Address::HandedOver,
            Some(path) => Address::Unix(path.clone()),
            None => Address::Tcp(self.address(self.port)?),
        };
        let probes = self.prometheus_port.map(|port| self.address(port).map(Address::Probes)).transpose()?;
        let grpc = match &self.grpc_unix_socket {
            Some(path) => Some(Address::GrpcUnix(path.clone())),
            None => self.grpc_port.map(|port| self.address(port).map(Address::Grpc)).transpose()?,
        };
        Ok([Some(first), probes, grpc, self.admin.clone()].into_iter().flatten().collect())
    }

    fn address(&self, port: u16) -> Result<SocketAddr> {
        let Some(host) = &self.hostname else {
            // Containers have their own name in it, which is no address; text-embeddings-inference passes over that too.
            let of_environment = std::env::var("HOSTNAME").ok().and_then(|host| host.parse().ok());
            let ip = of_environment.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            return Ok(SocketAddr::new(ip, port));
        };
        let found = (host.as_str(), port).to_socket_addrs().with_context(|| format!("--hostname {host} is no address"))?.next();
        found.with_context(|| format!("--hostname {host} has no address"))
    }

    /// What `--admin` allows: models from where the server's own come from, opened in the same way.
    fn admin_settings(self: &Arc<Self>) -> Result<Option<Admin>> {
        if self.admin.is_none() {
            return Ok(None);
        }
        let (args, executor) = (self.clone(), self.executor()?);
        let mut admin = Admin::new(Arc::new(move |source| args.builder(source, &executor).map_err(|error| format!("{error:#}"))));
        admin.keys.clone_from(&self.admin_key);
        Ok(Some(admin))
    }

    fn settings(self: &Arc<Self>) -> Result<Settings> {
        let mut settings = Settings::default();
        settings.admin = self.admin_settings()?;
        if let Some(path) = &self.calibration_texts {
            let text = std::fs::read_to_string(path).with_context(|| format!("--calibration-texts {}", path.display()))?;
            settings.calibration_texts = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
            anyhow::ensure!(
                !settings.calibration_texts.is_empty(),
                "--calibration-texts {}: there is no text in it",
                path.display()
            );
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            let collector = Collector::new(endpoint, &self.otlp_service_name);
            settings.traces = Some(collector.map_err(|reason| Usage(format!("--otlp-endpoint: {reason}")))?);
        }
        settings.max_client_batch_size = self.max_client_batch_size;
        settings.max_concurrent_requests = self.max_concurrent_requests;
        settings.max_queue_tokens = self.max_queue_tokens;
        settings.payload_limit = self.payload_limit;
        settings.max_connections = self.max_connections;
        settings.auto_truncate = self.auto_truncate;
        settings.api_keys.clone_from(&self.api_key);
        settings.cors_allow_origin.clone_from(&self.cors_allow_origin);
        settings.tokenization_workers = self.tokenization_workers;
        if let (Some(certificate), Some(key)) = (self.tls_cert.clone(), self.tls_key.clone()) {
            settings.tls = Some(TlsFiles { certificate, key });
        }
        settings.header_timeout = Duration::from_secs_f64(self.header_timeout);
        settings.body_timeout = Duration::from_secs_f64(self.body_timeout);
        settings.write_timeout = Duration::from_secs_f64(self.write_timeout);
        settings.request_timeout = Duration::from_secs_f64(self.request_timeout);
        settings.shutdown_timeout = Duration::from_secs_f64(self.shutdown_timeout);
        settings.health_timeout = Duration::from_secs_f64(self.health_timeout);
        settings.recovery_delay = Duration::from_secs_f64(self.recovery_delay);
        settings.recovery_timeout = Duration::from_secs_f64(self.recovery_timeout);
        Ok(settings)
    }
}

/// Whether systemd has handed sockets to this process (sd_listen_fds(3)).
fn handed_over() -> bool {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
    number("LISTEN_FDS").is_some_and(|count| count > 0) && number("LISTEN_PID") == Some(std::process::id())
}

/// `NAME=MODEL` taken apart; a folder that has `=` in its path is its own name.
fn name_and_source(named: &str) -> (&str, &str) {
    match named.split_once('=') {
        Some((name, source)) if !name.is_empty() && !name.contains('/') && !Path::new(named).exists() => (name, source),
        _ => (named, named),
    }
}

/// Where an admin is listened for.
fn admin_address(text: &str) -> Result<Address, String> {
    if text.contains('/') {
        return Ok(Address::AdminUnix(text.into()));
    }
    let address = match text.parse::<u16>() {
        Ok(port) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        Err(_) => text.parse::<SocketAddr>(),
    };
    let refused =
        |_| format!("\"{text}\" is neither a port, nor ADDRESS:PORT with an address in numbers, nor a path with a `/` in it");
    address.map(Address::Admin).map_err(refused)
}

/// Milliseconds of `--linger`.
fn linger(text: &str) -> Result<f64, String> {
    let milliseconds: f64 = text.parse().map_err(|_| format!("\"{text}\" is no number of milliseconds"))?;
    if (0.0..=1000.0).contains(&milliseconds) {
        Ok(milliseconds)
    } else {
        Err(format!("{text} is outside 0 to 1000 milliseconds"))
    }
}

/// A time of this program's flags: longer than nothing, at most a day.
fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("\"{text}\" is no number of seconds"))?;
    if seconds > 0.0 && seconds <= 86_400.0 { Ok(seconds) } else { Err(format!("{text} is outside 0 to 86400 seconds")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_before_their_models() {
        for (named, parts) in [
            ("small=models/a", ("small", "models/a")),
            ("org/name@main", ("org/name@main", "org/name@main")),
            ("models/a=b", ("models/a=b", "models/a=b")),
            ("a=b=c", ("a", "b=c")),
            ("=b", ("=b", "=b")),
        ] {
            assert_eq!(name_and_source(named), parts, "{named}");
        }
    }

    #[test]
    fn an_admin_has_an_address_of_this_machine_unless_it_says_another() {
        for (text, address) in [
            ("3001", Address::Admin("127.0.0.1:3001".parse().unwrap())),
            ("0.0.0.0:0", Address::Admin("0.0.0.0:0".parse().unwrap())),
            ("[::1]:3001", Address::Admin("[::1]:3001".parse().unwrap())),
            ("./admin", Address::AdminUnix("./admin".into())),
        ] {
            assert_eq!(admin_address(text), Ok(address), "{text}");
        }
        for text in ["", "admin", "70000", "localhost:3001", "-1"] {
            assert!(admin_address(text).unwrap_err().contains("neither"), "{text}");
        }
    }

    #[test]
    fn times_are_bounded() {
        assert_eq!(seconds("0.25"), Ok(0.25));
        for text in ["0", "-1", "NaN", "inf", "1e9", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert_eq!((linger("0"), linger("2.5")), (Ok(0.0), Ok(2.5)));
        for text in ["-1", "NaN", "1000.1", "soon"] {
            assert!(linger(text).is_err(), "{text}");
        }
    }
}
