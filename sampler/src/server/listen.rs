//! Connections: taken in up to a number, served, and let go when the server goes down.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use axum::Router;
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{app::app, service::Service};

/// Connections at a time; more wait in the system's queue.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client of the jobs API may take to fetch its images when the server goes down.
const FETCH_TIME: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 << 10;

/// Serves `listener` until `closing` resolves and what was accepted is answered, or `grace` is over.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    closing: impl Future<Output = ()>,
    grace: Duration,
) -> Result<()> {
    let router = app(service.clone());
    let (close, closed) = watch::channel(false);
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accept = accept(&listener, &service, &router, &closed, &permits);
    tokio::pin!(closing, accept);
    tokio::select! {
        result = &mut accept => return result,
        () = &mut closing => service.close(),
    }
    // New connections may still ask for what they were promised.
    tokio::select! {
        result = &mut accept => return result,
        () = drained(&service, grace) => {}
    }
    close.send_replace(true);
    let all = permits.acquire_many(MAX_CONNECTIONS as u32);
    // A connection that will not end is cut off with the process.
    let _ = timeout(Duration::from_secs(2), all).await;
    Ok(())
}

/// Waits until what was under way is answered: every job has ended, and those of the jobs API have been
/// fetched, for which their clients have [`FETCH_TIME`].
async fn drained(service: &Service, grace: Duration) {
    let (start, promised) = (Instant::now(), service.store.under_way());
    let mut ended = None;
    while start.elapsed() < grace {
        if promised.iter().all(|job| job.see(|board| board.state.is_end())) {
            let fetched = promised.iter().all(|job| job.is_delivered());
            if fetched || ended.get_or_insert_with(Instant::now).elapsed() > FETCH_TIME {
                return;
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
    service.log.event("grace_over", serde_json::json!({"seconds": grace.as_secs_f64()}));
    for job in promised {
        service.cancel(&job, "shutdown");
    }
}

async fn accept(
    listener: &TcpListener,
    service: &Arc<Service>,
    router: &Router,
    closed: &watch::Receiver<bool>,
    permits: &Arc<Semaphore>,
) -> Result<()> {
    loop {
        let permit = permits.clone().acquire_owned().await.context("connections are counted")?;
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, or the client is gone already.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (router, closed, service) = (router.clone(), closed.clone(), service.clone());
        tokio::spawn(async move {
            service.connections.fetch_add(1, Ordering::Relaxed);
            connection(stream, router, closed, service.patience.head).await;
            service.connections.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
        });
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    mut closed: watch::Receiver<bool>,
    head: Duration,
) {
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        hyper::service::Service::call(&service, request)
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let told = async { closed.wait_for(|closed| *closed).await.is_ok() };
    let ended = tokio::select! {
        ended = &mut connection => ended,
        _ = told => {
            std::pin::Pin::new(&mut connection).graceful_shutdown();
            (&mut connection).await
        }
    };
    if let Err(error) = ended
        && (error.is_timeout() || error.is_incomplete_message())
    {
        let mut stream = connection.into_parts().io.into_inner();
        let _ = stream.write_all(LATE).await;
        let _ = stream.shutdown().await;
    }
}

/// What is said to a request whose head never became whole.
const LATE: &[u8] =
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
