package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func sleep(ctx context.Context, args []string) error {
	d, err := time.ParseDuration(arg(args, 0, "876000h"))
	if err != nil {
		return err
	}
	return wait(ctx, d)
}

func stubborn(context.Context, []string) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	fmt.Println("stubborn: waiting")
	return wait(context.Background(), 876000*time.Hour)
}

func crash(ctx context.Context, args []string) error {
	code, err := strconv.Atoi(arg(args, 0, "1"))
	if err != nil {
		return err
	}
	after, err := time.ParseDuration(arg(args, 1, "0s"))
	if err != nil {
		return err
	}
	if err := wait(ctx, after); err != nil {
		return err
	}
	fmt.Printf("crash: exit %d\n", code)
	return exitCode(code)
}

func oom(ctx context.Context, args []string) error {
	most, err := strconv.Atoi(arg(args, 0, "1000000"))
	if err != nil {
		return err
	}
	var keep [][]byte
	for i := range most {
		b := make([]byte, 1<<20)
		for j := 0; j < len(b); j += os.Getpagesize() {
			b[j] = 1
		}
		keep = append(keep, b)
		if i%16 == 15 {
			fmt.Printf("oom: %d MiB\n", i+1)
		}
	}
	err = wait(ctx, 876000*time.Hour)
	runtime.KeepAlive(keep)
	return err
}

func burn(ctx context.Context, args []string) error {
	d, err := time.ParseDuration(arg(args, 0, "10s"))
	if err != nil {
		return err
	}
	for end := time.Now().Add(d); time.Now().Before(end) && ctx.Err() == nil; {
	}
	return nil
}

func printLines(ctx context.Context, args []string) error {
	n, err := strconv.Atoi(arg(args, 0, "10"))
	if err != nil {
		return err
	}
	each, err := time.ParseDuration(arg(args, 1, "0s"))
	if err != nil {
		return err
	}
	for i := range n {
		fmt.Printf("line %d\n", i)
		if err := wait(ctx, each); err != nil {
			return err
		}
	}
	return nil
}

// fetch copies the body of url to w, over a connection of its own.
func fetch(ctx context.Context, w io.Writer, url string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(w, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, res.Status)
	}
	return nil
}

func get(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no URL")
	}
	n, err := strconv.Atoi(arg(args, 1, "1"))
	if err != nil {
		return err
	}
	timeout, err := time.ParseDuration(arg(args, 2, "5s"))
	if err != nil {
		return err
	}
	failed := 0
	for range n {
		if err := fetch(ctx, os.Stdout, args[0], timeout); err != nil {
			fmt.Println("ERROR", err)
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d requests failed", failed, n)
	}
	return nil
}

func tcp(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no address")
	}
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintln(c, arg(args, 1, "hello")); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Printf("%s from %s\n", strings.TrimSpace(line), c.RemoteAddr())
	return nil
}

func udp(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no address")
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "udp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 64<<10)
	for try := 1; ; try++ { // packets may get lost
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err := io.WriteString(c, arg(args, 1, "hello")); err != nil {
			return err
		}
		n, err := c.Read(b)
		if err == nil {
			fmt.Printf("%s from %s\n", b[:n], c.RemoteAddr())
			return nil
		}
		if try == 5 || ctx.Err() != nil {
			return err
		}
	}
}

func dns(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no name")
	}
	r := &net.Resolver{PreferGo: true}
	if server := arg(args, 1, ""); server != "" {
		if _, _, err := net.SplitHostPort(server); err != nil {
			server = net.JoinHostPort(server, "53")
		}
		r.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, server)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	addrs, err := r.LookupHost(ctx, args[0])
	if err != nil {
		return err
	}
	fmt.Println(strings.Join(addrs, "\n"))
	return nil
}

func env(context.Context, []string) error {
	printEnv(os.Stdout)
	return nil
}

func cat(_ context.Context, args []string) error {
	for _, f := range args {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if _, err := os.Stdout.Write(b); err != nil {
			return err
		}
	}
	return nil
}

func write(_ context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("want FILE TEXT")
	}
	return os.WriteFile(args[0], []byte(args[1]), 0o644)
}
