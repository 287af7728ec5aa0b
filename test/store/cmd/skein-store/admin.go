package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"skein.io/skein/consensus/host"
)

// adminTimeout bounds a call of the admin endpoint.
const adminTimeout = 30 * time.Second

// serveAdmin answers, over HTTP:
//
//	/status                                         what Host.Status says, as JSON
//	/bootstrap                                      make this node the first voter of every shard
//	/start-replica?shard=S&replica=N                as the leader would order it
//	/stop-replica?shard=S&replica=N[&remove=1]
//	/membership?shard=S
//	/member/add?shard=S&replica=N&node=NODEHOSTID   a replica without a vote; N=0 takes the next free one
//	/member/promote?...  /member/remove?...         the membership's change ID is read first
//	/transfer?shard=S&to=N                          hand the leadership over (N=0: to any)
//	/progress?shard=S&node=NODEHOSTID               how far a replica is
//	/cut                                            hold all shards for a moment, as a backup does
//	/fence                                          what the fence writer (-fence-writer) has done
//	/mem[?gc=1]                                     Go's view of its memory; gc gives back what is free
//	/pprof/...                                      as net/http/pprof
func serveAdmin(h *host.Host, addr string, f *fenceWriter, failed chan<- error) (*http.Server, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	a := admin{h}
	mux := http.NewServeMux()
	for path, f := range map[string]func(context.Context, query) (any, error){
		"/status":         func(context.Context, query) (any, error) { return h.Status(), nil },
		"/bootstrap":      func(ctx context.Context, _ query) (any, error) { return nil, h.Bootstrap(ctx) },
		"/start-replica":  a.startReplica,
		"/stop-replica":   a.stopReplica,
		"/membership":     func(ctx context.Context, q query) (any, error) { return h.Membership(ctx, q.shard()) },
		"/member/add":     a.change(host.AddNonVoter),
		"/member/promote": a.change(host.Promote),
		"/member/remove":  a.change(host.Remove),
		"/transfer":       a.transfer,
		"/progress": func(ctx context.Context, q query) (any, error) {
			return h.Progress(ctx, q.FormValue("node"), q.shard())
		},
		"/cut":   a.cut,
		"/fence": func(context.Context, query) (any, error) { return f.counts(), nil },
		"/mem":   mem,
	} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), adminTimeout)
			defer cancel()
			v, err := f(ctx, query{r})
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			_ = json.NewEncoder(w).Encode(v) // the client has gone
		})
	}
	mux.HandleFunc("/pprof/", func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = "/debug" + r.URL.Path
		pprof.Index(w, r)
	})
	mux.HandleFunc("/pprof/profile", pprof.Profile)
	mux.HandleFunc("/pprof/trace", pprof.Trace)
	s := &http.Server{Handler: mux}
	go func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("admin: %w", err)
		}
	}()
	return s, nil
}

type query struct{ *http.Request }

func (q query) shard() string { return q.FormValue("shard") }

func (q query) number(name string) (uint64, error) {
	v := q.FormValue(name)
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

type admin struct{ h *host.Host }

func (a admin) startReplica(ctx context.Context, q query) (any, error) {
	n, err := q.number("replica")
	if err != nil {
		return nil, err
	}
	return nil, a.h.StartReplica(ctx, q.shard(), n)
}

func (a admin) stopReplica(ctx context.Context, q query) (any, error) {
	n, err := q.number("replica")
	if err != nil {
		return nil, err
	}
	return nil, a.h.StopReplica(ctx, q.shard(), n, q.FormValue("remove") != "")
}

func (a admin) transfer(ctx context.Context, q query) (any, error) {
	n, err := q.number("to")
	if err != nil {
		return nil, err
	}
	return nil, a.h.TransferLeadership(ctx, q.shard(), n)
}

func (a admin) cut(ctx context.Context, _ query) (any, error) {
	c, err := a.h.Cut(ctx)
	if err != nil {
		return nil, err
	}
	return fmt.Sprintf("held for %v in %d attempts", c.Held, c.Attempts), c.Close()
}

// change answers with the replica's number.
func (a admin) change(c host.Change) func(context.Context, query) (any, error) {
	return func(ctx context.Context, q query) (any, error) {
		n, err := q.number("replica")
		if err != nil {
			return nil, err
		}
		m, err := a.h.Membership(ctx, q.shard())
		if err != nil {
			return nil, err
		}
		if n == 0 && c == host.AddNonVoter {
			n = m.ConfigChangeID + 1
		}
		return n, a.h.ChangeMembership(ctx, q.shard(), c, n, q.FormValue("node"), m.ConfigChangeID)
	}
}

func mem(_ context.Context, q query) (any, error) {
	if q.FormValue("gc") != "" {
		debug.FreeOSMemory()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return map[string]uint64{
		"heapAlloc": m.HeapAlloc, "heapInuse": m.HeapInuse, "heapIdle": m.HeapIdle, "heapReleased": m.HeapReleased, "stack": m.StackInuse,
		"sys": m.Sys, "numGC": uint64(m.NumGC), "goroutines": uint64(runtime.NumGoroutine()),
	}, nil
}
