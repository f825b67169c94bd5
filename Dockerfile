# Two images from one build:
#   docker build --target relay      --tag cache-invalidation/relay .
#   docker build --target subscriber --tag cache-invalidation/subscriber .
# Plain Dockerfile syntax on purpose: no BuildKit-only feature, so that every builder and CI cache can use it.

# The toolchain the project is tested with. Its Debian release must be that of RUNTIME_IMAGE: the binaries use its glibc
# (whose allocator copes with many threads; musl's does not).
ARG RUST_IMAGE=rust:1.95.0-slim-bookworm

# No shell, no package manager; has glibc, the root certificates that TLS to Postgres, NATS and Redis is checked with, and
# an unprivileged user. The tag moves with Debian's security updates: pin a digest where builds must be reproducible.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot


# Everything that decides what the dependencies are, and nothing else: manifests, lock file, and a stub for every target.
# Its content is the same until one of those changes, so the layer that compiles the dependencies stays cached.
FROM ${RUST_IMAGE} AS skeleton
WORKDIR /src
COPY . .
# The stub is documented because the workspace denies missing docs.
RUN printf '//! Stub.\nfn main() {}\n' > /stub.rs \
    && find . -type f \
        ! -name Cargo.toml ! -name Cargo.lock ! -name build.rs \
        ! -path '*/src/lib.rs' ! -path '*/src/main.rs' ! -path '*/src/bin/*.rs' \
        ! -path '*/tests/*.rs' ! -path '*/benches/*.rs' ! -path '*/examples/*.rs' \
        -delete \
    && find . -type l -delete \
    && find . -type d -empty -delete \
    && find . -name '*.rs' -exec cp /stub.rs {} \;


FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY --from=skeleton /src .
RUN cargo build --release --locked --package relay --package subscriber --features relay/otlp,subscriber/otlp
COPY . .
# Cargo judges by modification times, and the stubs were built after the sources were last written.
RUN find . -path ./target -prune -o -name '*.rs' -exec touch {} + \
    && cargo build --release --locked --package relay --package subscriber --features relay/otlp,subscriber/otlp


FROM ${RUNTIME_IMAGE} AS relay
LABEL org.opencontainers.image.title="relay" \
      org.opencontainers.image.description="Publishes the cache invalidations of committed Postgres transactions to NATS JetStream" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /src/target/release/relay /usr/local/bin/relay
# A number, so that an orchestrator can see that it is not root.
USER 65532:65532
# The default, loopback, cannot be scraped from outside the container.
ENV HTTP_ADDR=0.0.0.0:9464
EXPOSE 9464
# Asks the process's own /readyz; there is no curl in the image.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["/usr/local/bin/relay", "health"]
ENTRYPOINT ["/usr/local/bin/relay"]


FROM ${RUNTIME_IMAGE} AS subscriber
LABEL org.opencontainers.image.title="subscriber" \
      org.opencontainers.image.description="Invalidates the Redis keys that events from NATS JetStream name" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /src/target/release/subscriber /usr/local/bin/subscriber
USER 65532:65532
ENV HTTP_ADDR=0.0.0.0:9465
EXPOSE 9465
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["/usr/local/bin/subscriber", "health"]
ENTRYPOINT ["/usr/local/bin/subscriber"]
