// Command app is the program inside the project's own test images: a small web server that says where it runs, servers to
// probe, ways to fail, and clients. It needs no file but itself, so that its image needs none either.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// command is one mode of the program. It works until ctx ends (SIGTERM or SIGINT), and returns nil then.
type command struct {
	usage string
	run   func(ctx context.Context, args []string) error
}

var commands map[string]command

func init() {
	commands = map[string]command{
		"web":        {"web [ADDRESS]: serve HTTP (default :8080; $PORT)", web},
		"serve-tcp":  {"serve-tcp ADDRESS: echo lines", serveTCP},
		"serve-udp":  {"serve-udp ADDRESS: echo packets, the host name in front", serveUDP},
		"serve-grpc": {"serve-grpc ADDRESS [STATUS]: answer gRPC health checks (1 = serving)", serveGRPC},
		"sleep":      {"sleep [DURATION]: wait, without end if none is given", sleep},
		"stubborn":   {"stubborn: wait without end and ignore SIGTERM", stubborn},
		"crash":      {"crash [CODE] [AFTER]: end with CODE (default 1) after a time", crash},
		"oom":        {"oom [MIB]: take memory, all of it if no limit is given", oom},
		"burn":       {"burn DURATION: use one CPU", burn},
		"print":      {"print LINES [EACH]: write numbered lines, one each duration", printLines},
		"get":        {"get URL [COUNT] [TIMEOUT]: fetch over a new connection each time; ends with 1 if one failed", get},
		"tcp":        {"tcp ADDRESS [TEXT]: send a line, print the answer and who gave it", tcp},
		"udp":        {"udp ADDRESS [TEXT]: send a packet, print the answer and who gave it", udp},
		"dns":        {"dns NAME [SERVER]: print the addresses of NAME", dns},
		"env":        {"env: print the environment", env},
		"cat":        {"cat FILE...: print files", cat},
		"write":      {"write FILE TEXT: write a file", write},
	}
}

func main() {
	name := "web"
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	c, ok := commands[name]
	if !ok {
		for _, c := range commands {
			fmt.Fprintln(os.Stderr, c.usage)
		}
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := exitOf(ctx, name, c.run(ctx, os.Args[min(2, len(os.Args)):]))
	stop()
	os.Exit(code)
}

// exitOf gives the exit code for the result of a command, and says what failed. A command that was told to end (ctx is done: ask
// before stop, which ends it too) ended well.
func exitOf(ctx context.Context, name string, err error) int {
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	if err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	return 0
}

// exitCode ends the program with it.
type exitCode int

func (e exitCode) Error() string { return "exit " + strconv.Itoa(int(e)) }

// arg gives args[i], or what stands for a missing one.
func arg(args []string, i int, missing string) string {
	if i < len(args) {
		return args[i]
	}
	return missing
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
