package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// self says who answers: the pod's name, node and address, from the downward API where it is used.
type self struct{ pod, node, ip string }

func whoami() self {
	s := self{os.Getenv("POD_NAME"), os.Getenv("NODE_NAME"), os.Getenv("POD_IP")}
	if s.pod == "" {
		s.pod, _ = os.Hostname()
	}
	if s.ip == "" {
		addrs, _ := net.InterfaceAddrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				s.ip = n.IP.String()
				break
			}
		}
	}
	return s
}

// web answers each path with who it is, and a few paths with more:
//
//	/healthz             200, or 500 after /healthz?set=fail
//	/env                 the environment, sorted
//	/slow?ms=N           the usual answer, N ms later (default 1000)
//	/exit?code=N         the usual answer, then the program ends with N (default 1)
//	/get?url=U           what U answers to this pod
//	/dns?name=N          the addresses of N, as this pod sees them
//	/file?path=P         a file
//
// On SIGTERM it answers what is under way and ends with 0.
func web(ctx context.Context, args []string) error {
	addr := ":" + cmpOr(os.Getenv("PORT"), "8080")
	me := whoami()
	srv := &http.Server{Addr: arg(args, 0, addr), Handler: handler(me), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		sctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		done <- srv.Shutdown(sctx)
	}()
	log.Printf("web: pod=%s node=%s ip=%s listens on %s", me.pod, me.node, me.ip, srv.Addr)
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-done
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func handler(me self) http.Handler {
	var sick atomic.Bool
	who := func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "pod=%s node=%s ip=%s peer=%s path=%s\n", me.pod, me.node, me.ip, r.RemoteAddr, r.URL.Path)
	}
	number := func(r *http.Request, key string, missing int) int {
		if n, err := strconv.Atoi(r.URL.Query().Get(key)); err == nil {
			return n
		}
		return missing
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", who)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Query().Get("set") {
		case "fail":
			sick.Store(true)
		case "ok":
			sick.Store(false)
		}
		if sick.Load() {
			http.Error(w, "told to fail", http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/env", func(w http.ResponseWriter, _ *http.Request) { printEnv(w) })
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		if wait(r.Context(), time.Duration(number(r, "ms", 1000))*time.Millisecond) == nil {
			who(w, r)
		}
	})
	mux.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) {
		who(w, r)
		_ = http.NewResponseController(w).Flush()
		log.Print("web: told to exit")
		os.Exit(number(r, "code", 1))
	})
	mux.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		if err := fetch(r.Context(), &b, r.URL.Query().Get("url"), 5*time.Second); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		_, _ = w.Write(b.Bytes())
	})
	mux.HandleFunc("/dns", func(w http.ResponseWriter, r *http.Request) {
		addrs, err := net.DefaultResolver.LookupHost(r.Context(), r.URL.Query().Get("name"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		sort.Strings(addrs)
		fmt.Fprintln(w, strings.Join(addrs, "\n"))
	})
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(r.URL.Query().Get("path"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(b)
	})
	return mux
}

func printEnv(w io.Writer) {
	e := os.Environ()
	sort.Strings(e)
	fmt.Fprintln(w, strings.Join(e, "\n"))
}

func serveTCP(ctx context.Context, args []string) error {
	l, err := net.Listen("tcp", arg(args, 0, ":9000"))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			for sc := bufio.NewScanner(c); sc.Scan(); {
				fmt.Fprintf(c, "%s %s\n", whoami().pod, sc.Text())
			}
		}()
	}
}

func serveUDP(ctx context.Context, args []string) error {
	c, err := net.ListenPacket("udp", arg(args, 0, ":9000"))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(append([]byte(whoami().pod+" "), b[:n]...), from); err != nil {
			log.Print(err)
		}
	}
}

// serveGRPC answers grpc.health.v1.Health/Check by hand: a gRPC answer is an HTTP/2 one with a five-byte frame and a trailer, and
// the library would double the size of the image.
func serveGRPC(ctx context.Context, args []string) error {
	status, err := strconv.Atoi(arg(args, 1, "1"))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /grpc.health.v1.Health/Check", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 64<<10))
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		msg := []byte{0x08, byte(status)} // HealthCheckResponse: field 1, varint
		frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg)))
		_, _ = w.Write(append(frame, msg...))
		w.Header().Set("Grpc-Status", "0")
	})
	srv := &http.Server{Addr: arg(args, 0, ":9000"), Handler: mux, ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	srv.Protocols.SetUnencryptedHTTP2(true)
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	return srv.ListenAndServe()
}
