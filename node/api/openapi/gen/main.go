//go:build openapigen

// Command gen renders the OpenAPI documents that package openapi embeds.
//
// It runs upstream's own kube-apiserver of the Kubernetes version in go.mod, on an etcd in a
// temporary directory, both inside this process, and stores what that server answers under
// /openapi/v2 and /openapi/v3, and beside them the documents of metrics.k8s.io (metrics.go). So the documents are upstream's byte for byte, and no code that
// renders them is linked into skein (it would cost some 70 MB of memory).
//
// Run it through "go generate ./node/api/openapi". The output depends on the version of Kubernetes
// and of Go (compress/gzip) only.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

func main() {
	all := flag.Bool("all", false, "serve every version, and write what is not below OUTPUT-DIRECTORY already to OUTPUT-DIRECTORY/extra")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: gen [-all] OUTPUT-DIRECTORY")
		os.Exit(2)
	}
	if err := run(flag.Arg(0), *all); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(out string, all bool) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	tmp, err := os.MkdirTemp("", "openapi-gen")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	store, err := startEtcd(tmp)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer store.Close()
	var more []string
	if all {
		more = []string{"--runtime-config=api/all=true"}
	}
	client, stopped, err := startServer(ctx, tmp, store.Clients[0].Addr().String(), more)
	if err != nil {
		return fmt.Errorf("kube-apiserver: %w", err)
	}
	err = render(ctx, client, out, all)
	cancel()
	<-stopped
	if err == nil && !all {
		err = renderMetrics(out)
	}
	return err
}

// startEtcd runs etcd on a free loopback port.
func startEtcd(dir string) (*embed.Etcd, error) {
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(dir, "etcd")
	cfg.LogLevel = "error"
	cfg.UnsafeNoFsync = true
	any := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{any}, []url.URL{any}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, err
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err := <-e.Err():
		return nil, err
	}
}

// startServer runs kube-apiserver with defaults and more options, and returns a client with full rights, and a
// channel that is closed when the server has stopped.
func startServer(ctx context.Context, dir, etcd string, more []string) (rest.Interface, <-chan struct{}, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	saKey := filepath.Join(dir, "sa.key")
	if err := writeKey(saKey); err != nil {
		return nil, nil, err
	}
	o := options.NewServerRunOptions()
	o.SecureServing.Listener = l
	flags := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, f := range o.Flags().FlagSets {
		flags.AddFlagSet(f)
	}
	issuer := "https://kubernetes.default.svc.cluster.local"
	err = flags.Parse(append(more,
		"--etcd-servers=http://"+etcd, "--cert-dir="+dir, "--authorization-mode=RBAC",
		"--advertise-address=192.0.2.10", "--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer="+issuer, "--service-account-key-file="+saKey, "--service-account-signing-key-file="+saKey,
	))
	if err != nil {
		return nil, nil, err
	}
	if err := o.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, nil, err
	}
	completed, err := o.Complete(ctx)
	if err != nil {
		return nil, nil, err
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return nil, nil, errors.Join(errs...)
	}
	config, err := app.NewConfig(completed)
	if err != nil {
		return nil, nil, err
	}
	c, err := config.Complete()
	if err != nil {
		return nil, nil, err
	}
	chain, err := app.CreateServerChain(c)
	if err != nil {
		return nil, nil, err
	}
	prepared, err := chain.PrepareRun()
	if err != nil {
		return nil, nil, err
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		if err := prepared.Run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "kube-apiserver:", err)
		}
	}()
	lc := rest.CopyConfig(chain.GenericAPIServer.LoopbackClientConfig)
	lc.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	client, err := rest.UnversionedRESTClientFor(lc)
	return client, stopped, err
}

func writeKey(path string) error {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// render waits until the server is ready and writes its documents.
func render(ctx context.Context, c rest.Interface, out string, all bool) error {
	deadline := time.Now().Add(2 * time.Minute)
	for {
		if b, err := c.Get().AbsPath("/readyz").DoRaw(ctx); err == nil && string(b) == "ok" {
			break
		} else if time.Now().After(deadline) {
			return fmt.Errorf("server is not ready: %w (%s)", err, b)
		}
		time.Sleep(100 * time.Millisecond)
	}
	have := map[string]bool{}
	if all {
		entries, err := os.ReadDir(filepath.Join(out, "v3"))
		if err != nil {
			return err
		}
		for _, e := range entries {
			have[e.Name()] = true
		}
		out = filepath.Join(out, "extra")
	}
	if err := os.RemoveAll(out); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(out, "v3"), 0o755); err != nil {
		return err
	}
	for name, accept := range map[string]string{
		"v2.json.gz": "application/json",
		"v2.pb.gz":   "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
	} {
		if all && name == "v2.pb.gz" { // made from the other, for those who ask
			continue
		}
		b, err := stable(ctx, c, accept, "/openapi/v2")
		if err != nil {
			return err
		}
		if err := write(filepath.Join(out, name), b); err != nil {
			return err
		}
	}
	b, err := c.Get().AbsPath("/openapi/v3").DoRaw(ctx)
	if err != nil {
		return err
	}
	var index struct{ Paths map[string]any }
	if err := json.Unmarshal(b, &index); err != nil {
		return fmt.Errorf("/openapi/v3: %w", err)
	}
	for p := range index.Paths {
		// These two servers are linked and render their own, small documents.
		if strings.HasPrefix(p, "apis/apiextensions.k8s.io") || strings.HasPrefix(p, "apis/apiregistration.k8s.io") {
			continue
		}
		name := strings.ReplaceAll(p, "/", "__") + ".json.gz"
		if have[name] {
			continue
		}
		b, err := c.Get().SetHeader("Accept", "application/json").AbsPath("/openapi/v3/" + p).DoRaw(ctx)
		if err != nil {
			return fmt.Errorf("/openapi/v3/%s: %w", p, err)
		}
		if err := write(filepath.Join(out, "v3", name), b); err != nil {
			return err
		}
	}
	return nil
}

// stable reads a document until it stopped changing: the aggregated one grows as
// parts of the server report theirs.
func stable(ctx context.Context, c rest.Interface, accept, path string) ([]byte, error) {
	var last []byte
	same := 0
	for range 120 {
		b, err := c.Get().SetHeader("Accept", accept).AbsPath(path).DoRaw(ctx)
		if err == nil && bytes.Equal(b, last) {
			if same++; same == 8 && bytes.Contains(b, []byte("apiextensions.k8s.io")) && bytes.Contains(b, []byte("apiregistration.k8s.io")) {
				return b, nil
			}
		} else {
			last, same = b, 0
		}
		time.Sleep(500 * time.Millisecond)
	}
	return nil, fmt.Errorf("%s did not settle within a minute (%d bytes)", path, len(last))
}

func write(path string, b []byte) error {
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := w.Write(b); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, buf.Bytes(), 0o644)
}
