package loopback

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const patience = 10 * time.Second

func serve(h http.HandlerFunc) *http.Client {
	t := &Transport{}
	t.Serve(h)
	return &http.Client{Transport: t}
}

func TestNotServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		_, err := (&http.Client{Transport: &Transport{}}).Get("http://in-process/")
		if !errors.Is(err, ErrNotServing) || time.Since(began) != startWait {
			t.Fatalf("got %v after %s", err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://in-process/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (&Transport{}).RoundTrip(r); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
	})
}

// A client that starts before the API is assembled is answered as soon as it is.
func TestWaitsForServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Transport{}
		time.AfterFunc(time.Second, func() {
			tr.Serve(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "late") }))
		})
		began := time.Now()
		res, err := (&http.Client{Transport: tr}).Get("http://in-process/")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if b, err := io.ReadAll(res.Body); string(b) != "late" || err != nil || time.Since(began) != time.Second {
			t.Fatalf("%q %v after %s", b, err, time.Since(began))
		}
	})
}

func TestRequestAndResponse(t *testing.T) {
	c := serve(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("X-Seen", fmt.Sprintf("%s %s %s %s %q", r.Method, r.RequestURI, r.Proto, r.RemoteAddr, b))
		w.WriteHeader(http.StatusTeapot)
		w.Header().Set("X-Late", "lost")
		fmt.Fprint(w, "body")
	})
	resp, err := c.Post("http://in-process/a/b?c=d", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || string(b) != "body" || resp.StatusCode != http.StatusTeapot || resp.Header.Get("X-Late") != "" {
		t.Errorf("got %s %q %v %v", resp.Status, b, resp.Header, err)
	}
	if got, want := resp.Header.Get("X-Seen"), `POST /a/b?c=d HTTP/2.0 127.0.0.1:0 "hello"`; got != want {
		t.Errorf("handler saw %s, want %s", got, want)
	}
}

func TestSilentHandlerIsOK(t *testing.T) {
	resp, err := serve(func(http.ResponseWriter, *http.Request) {}).Get("http://in-process/")
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("got %v, %v", resp, err)
	}
	resp.Body.Close()
}

func TestContextValuesArrive(t *testing.T) {
	type key struct{}
	tr := &Transport{}
	tr.Serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Context().Value(key{})) }))
	for _, tc := range []struct {
		decorate func(context.Context) context.Context
		want     string
	}{{nil, "<nil>"}, {func(ctx context.Context) context.Context { return context.WithValue(ctx, key{}, 7) }, "7"}} {
		resp, err := (&http.Client{Transport: tr.Decorated(tc.decorate)}).Get("http://in-process/")
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(b) != tc.want {
			t.Errorf("handler saw %s, want %s", b, tc.want)
		}
	}
}

// A watch ends in both directions: the client stops reading, or the handler stops writing.
func TestStream(t *testing.T) {
	ended := make(chan struct{})
	c := serve(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(w, "%d\n", i); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			if i == 2 {
				<-r.Context().Done()
				return
			}
		}
	})
	resp, err := c.Get("http://in-process/")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 6)
	if _, err := io.ReadFull(resp.Body, buf); err != nil || string(buf) != "0\n1\n2\n" {
		t.Fatalf("read %q, %v", buf, err)
	}
	resp.Body.Close()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the handler goes on after the client has gone")
	}
}

func TestCancelBeforeAnswer(t *testing.T) {
	ended := make(chan struct{})
	c := serve(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://in-process/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Do(r); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	<-ended
}

func TestPanics(t *testing.T) {
	c := serve(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/later" {
			fmt.Fprint(w, "part")
		}
		panic(http.ErrAbortHandler)
	})
	if _, err := c.Get("http://in-process/now"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("panic before the answer: %v", err)
	}
	resp, err := c.Get("http://in-process/later")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); string(b) != "part" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("panic within the answer: %q, %v", b, err)
	}
}
